"""The dispatcher: from how many rows each expert gets here to how many rows go to and come from each rank.

Experts sit in blocks: rank r of the ep axis holds the r-th E / ep of them.  Rows travel sorted by expert, so that what
goes to one rank is contiguous; what arrives is sorted by (source rank, expert) and is regrouped by expert.

R ranks of the ep axis, e experts on each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.model.node_rows import NodeWay
from megalina.model.permute import regroup_index, reorder


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows travel, and how arrived rows are ordered."""

    send_R: list[int]  # rows to each rank
    receive_R: list[int]  # rows from each rank
    count_e: list[int]  # rows for each expert that is here
    index_N: Tensor | None  # arrived rows in the order of experts; None: they are in that order already
    inverse_N: Tensor | None

    def splits(self, outward: bool) -> tuple[list[int], list[int]]:
        """(send, receive) of the way to the experts, or of the way back."""
        return (self.send_R, self.receive_R) if outward else (self.receive_R, self.send_R)


def sizes_of(sent_E: Tensor, received_E: Tensor, ranks: int) -> Sizes:
    """From this rank's rows for each expert, and (source rank, expert here) rows that come, both int64 [E]."""
    count_RE = received_E.view(ranks, -1)
    send_R = sent_E.view(ranks, -1).sum(1).tolist()
    counts = count_RE.tolist()
    index_N = inverse_N = None
    if ranks > 1 and count_RE.shape[1] > 1:
        index_N, inverse_N = regroup_index(counts, sent_E.device)
    return Sizes(send_R, [sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)], index_N, inverse_N)


class Counts:
    """How many rows of one part of a micro-batch go from here to each expert, and come here from each rank."""

    def __init__(self, sent_E: Tensor, received_E: Tensor, ranks: int, new_way: Callable[[], NodeWay] | None = None):
        """`new_way`: where ranks pass rows on in their nodes; then numbers are of nodes, of which there are `ranks`."""
        self._sent_E, self._received_E, self._ranks, self._new_way = sent_E, received_E, ranks, new_way
        self._ways: dict[tuple[int, int], NodeWay] = {}
        self._made: dict[int, list[Sizes]] = {}

    def sizes(self, chunk: tuple[int, int]) -> Sizes:
        """Of the c-th of n chunks, `chunk` being (c, n): every expert's rows are cut into n equal shares."""
        c, n = chunk
        if n not in self._made:
            shares = [(share_of_chunk(self._sent_E, i, n), share_of_chunk(self._received_E, i, n)) for i in range(n)]
            self._made[n] = [sizes_of(sent_E, received_E, self._ranks) for sent_E, received_E in shares]
        return self._made[n][c]

    def way(self, chunk: tuple[int, int], *, anew: bool) -> NodeWay:
        """That on which a chunk's rows are passed on; `anew`: they are on their way to the experts."""
        if anew:
            assert self._new_way is not None
            self._ways[chunk] = self._new_way()
        return self._ways[chunk]


def share_of_chunk(count: Tensor, c: int, chunks: int) -> Tensor:
    """How many of `count` rows go with chunk c: equal shares, the same on the side that sends and on the one that receives."""
    return count if chunks == 1 else count * (c + 1) // chunks - count * c // chunks


def cut_index(count_E: Tensor, chunks: int) -> tuple[Tensor, Tensor, list[int]]:
    """Index and inverse that bring rows sorted by expert into the order (chunk, expert), and each chunk's number of rows."""
    share_EC = torch.stack([share_of_chunk(count_E, c, chunks) for c in range(chunks)], 1)
    index_N, inverse_N = regroup_index(share_EC.tolist(), count_E.device)
    return index_N, inverse_N, share_EC.sum(0).tolist()


def by_expert(arrived_ND: Tensor, sizes: Sizes) -> Tensor:
    """Arrived rows in the order of experts."""
    if sizes.index_N is None or sizes.inverse_N is None:
        return arrived_ND
    return reorder(arrived_ND, sizes.index_N, sizes.inverse_N)


def by_source(rows_ND: Tensor, sizes: Sizes) -> Tensor:
    """The way back: rows in the order of experts become sorted by source rank again."""
    if sizes.index_N is None or sizes.inverse_N is None:
        return rows_ND
    return reorder(rows_ND, sizes.inverse_N, sizes.index_N)
