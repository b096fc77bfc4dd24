"""Collectives as flows: who sends how much to whom, by one algorithm or another.

Letters: F flows, N ranks of the group, M nodes.  Bytes are of the whole tensor: what a rank sends (also to itself), sums, or has
after a gather.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Collective(Enum):
    ALL_TO_ALL = "all-to-all"
    ALL_REDUCE = "all-reduce"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_GATHER = "all-gather"
    SEND = "send"  # from the first of two ranks to the second
    # of collectives in a row, as `megalina.comm.by_node` and `rows_by_node` have them, whatever the network's algorithm
    ALL_TO_ALL_BY_NODE = "all-to-all by node"
    ALL_REDUCE_BY_NODE = "all-reduce by node"
    REDUCE_SCATTER_BY_NODE = "reduce-scatter by node"
    ALL_GATHER_BY_NODE = "all-gather by node"

    @property
    def rounds(self) -> int:
        """An all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.flat is Collective.ALL_REDUCE else 1

    @property
    def flat(self) -> "Collective":
        """What it does, by node or not."""
        return Collective(self.value.removesuffix(" by node"))

    @property
    def by_node(self) -> "Collective":
        """The same by node, where there is such a thing."""
        return _BY_NODE.get(self, self)


_BY_NODE = {c.flat: c for c in Collective if c.flat is not c}


ALGORITHMS = ("direct", "ring", "tree", "hierarchical")
ALL_TO_ALLS = ("direct", "hierarchical")
MOST_FLOWS = 2**23  # of one collective, followed one by one: some GB


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """Flows that begin together; what comes next waits for them all.  `hops`, `fast_hops`: of the longest chain of messages that
    wait for one another, how many leave a node, and how many don't."""

    source_F: Ints  # global ranks
    target_F: Ints
    bytes_F: Floats
    hops: int
    fast_hops: int
    count_F: Ints | None = None  # that many flows; None: one each


def phases_of(
    what: Collective,
    ranks: Sequence[int],
    *,
    ranks_per_node: int,
    algorithm: str = "direct",
    rings: int = 1,
    bytes_NN: Floats | None = None,
    few: bool = False,
    nodes_per_group: int = 0,
    inside: float = 1.0,
) -> tuple[Phase, ...]:
    """The flows of a collective over `ranks`, for a tensor of one byte.

    direct: everybody sends to everybody, in one step each for reducing and gathering.
    ring: from neighbour to neighbour in the order of nodes, so that one flow of each ring leaves a node; `rings` of them, each
    with its part of the bytes, which leave a node from different ranks (channels, as in NCCL).
    tree: for all-reduce, two trees of nodes with half the bytes each, chains inside nodes (NCCL); else as ring.
    hierarchical: inside nodes, between ranks at the same place of their nodes, inside nodes again.
    A send is one flow by any of them.  What is by node is hierarchical where nodes hold equally many of the ranks, several.

    `bytes_NN`: of an all-to-all, from each rank to each, in place of even parts.  `few`: see `_direct_by_levels`, which needs
    `nodes_per_group`; `inside`: as of `Network`.  ValueError for bytes of another shape or another collective, for hierarchical
    where nodes hold unequal numbers of the ranks, and for more flows than memory has room for."""
    rank_N = np.asarray(ranks)
    node_N = rank_N // ranks_per_node
    n = len(rank_N)
    if bytes_NN is not None and (what.flat is not Collective.ALL_TO_ALL or bytes_NN.shape != (n, n)):
        raise ValueError(f"{what.value} over {n} ranks: bytes_NN is {bytes_NN.shape}, which only all-to-all takes, as {n, n}")
    if what is Collective.SEND:
        return (_sent(rank_N, leaves=bool(node_N[0] != node_N[1])),)
    by_node = _by_node(rank_N, node_N)
    near = inside if what is Collective.ALL_TO_ALL_BY_NODE else 1.0
    if what is not what.flat:
        algorithm = "hierarchical" if len({len(row) for row in by_node}) == 1 else algorithm
        what = what.flat
    direct = partial(_direct_by_levels, ranks_per_node, nodes_per_group) if few and bytes_NN is None else _direct
    if algorithm == "hierarchical" and 1 < len(by_node) < n:
        return _hierarchical(what, rank_N, by_node, bytes_NN, direct, near)
    if algorithm == "direct" or what is Collective.ALL_TO_ALL:
        return (direct(rank_N, len(by_node) > 1, what.rounds, bytes_NN),)
    if algorithm == "tree" and what is Collective.ALL_REDUCE:
        return (_trees(by_node),)
    return (_rings(by_node, what.rounds, rings),)


def _sent(rank_N: Ints, *, leaves: bool) -> Phase:
    return Phase(rank_N[:1], rank_N[1:], np.ones(1), int(leaves), int(not leaves))


def _direct(rank_N: Ints, leaves: bool, rounds: int, bytes_NN: Floats | None = None) -> Phase:
    n = len(rank_N)
    if n * n > MOST_FLOWS:
        raise ValueError(f"everybody to everybody is {n} x {n} flows, too many to follow one by one: choose hierarchical")
    sent_NN = np.full((n, n), rounds / n) if bytes_NN is None else bytes_NN
    source_F, target_F = np.nonzero(~np.eye(n, dtype=bool) & (sent_NN > 0))
    hops = (rounds, 0) if leaves else (0, rounds)
    return Phase(rank_N[source_F], rank_N[target_F], sent_NN[source_F, target_F], *hops)


def _direct_by_levels(
    ranks_per_node: int, nodes_per_group: int, rank_N: Ints, leaves: bool, rounds: int, bytes_NN: Floats | None = None
) -> Phase:
    """As `_direct` with even parts, but of all flows of a rank that stay in its node, in its group of nodes or leave that, one
    each, with their number: to the next rank of the node, the same place of the next node, of the next group.

    Each link carries what it carries of all flows.  Which flows meet on it is the same, too, if all links of a kind carry alike,
    which the caller must check.  Where nodes hold unequal numbers of the ranks it is `_direct`."""
    n = len(rank_N)
    order_N = np.sort(rank_N)
    node_M, in_node_M = np.unique(order_N // ranks_per_node, return_counts=True)
    _, in_core_C = np.unique(node_M // nodes_per_group if nodes_per_group else node_M * 0, return_counts=True)
    if len({*in_node_M.tolist()}) > 1 or len({*in_core_C.tolist()}) > 1:
        return _direct(rank_N, leaves, rounds, bytes_NN)
    rank_CMD = order_N.reshape(len(in_core_C), in_core_C[0], in_node_M[0])
    inside, core = in_node_M[0], in_node_M[0] * in_core_C[0]
    counts = ((2, inside - 1), (1, core - inside), (0, n - core))  # along which dimension the next one is, how many flows
    levels = [(np.roll(rank_CMD, -1, dimension).ravel(), count) for dimension, count in counts if count]
    targets = [target_N for target_N, _ in levels] or [order_N[:0]]
    sources = [order_N] * len(levels) or [order_N[:0]]
    count_F = np.repeat([count for _, count in levels], n).astype(int)
    bytes_F = np.full(len(count_F), rounds / n)
    hops = (rounds, 0) if leaves else (0, rounds)
    return Phase(np.concatenate(sources), np.concatenate(targets), bytes_F, *hops, count_F)


def _rings(by_node: Sequence[Ints], rounds: int, rings: int) -> Phase:
    orders = [_turned(by_node, k, rings) for k in range(rings)]
    n, nodes = len(orders[0]), len(by_node)
    leaving = min(nodes, n - 1) if nodes > 1 else 0
    bytes_F = np.full(n * rings, rounds * (n - 1) / n / rings)
    target_F = np.concatenate([np.roll(order, -1) for order in orders])
    return Phase(np.concatenate(orders), target_F, bytes_F, rounds * leaving, rounds * (n - 1 - leaving))


def _by_node(rank_N: Ints, node_N: Ints) -> list[Ints]:
    """The ranks of each node, in the order of nodes and in their own."""
    order_N = np.argsort(node_N, kind="stable")
    cuts = np.flatnonzero(np.diff(node_N[order_N])) + 1
    return np.split(rank_N[order_N], cuts)


def _turned(by_node: Sequence[Ints], k: int, rings: int) -> Ints:
    """The ranks of all nodes, of each beginning with another one: that of ring `k`."""
    if len({len(row) for row in by_node}) == 1:  # thousands of nodes at once
        return np.roll(np.stack(by_node), -(k * len(by_node[0]) // rings), axis=1).ravel()
    return np.concatenate([np.roll(row, -(k * len(row) // rings)) for row in by_node])


def _trees(by_node: Sequence[Ints]) -> Phase:
    """Each node's first rank is its place in the tree; in the second tree the nodes' order is turned round, so that a node with
    children in the one has none in the other."""
    child, parent = [], []
    for nodes in (list(by_node), list(reversed(by_node))):
        for i, row in enumerate(nodes):
            child += [*row[1:], *([row[0]] if i else [])]
            parent += [*row[:-1], *([nodes[(i - 1) // 2][0]] if i else [])]
    up_F, down_F = np.array(child), np.array(parent)
    chain, depth = max(map(len, by_node)) - 1, len(by_node).bit_length() - 1
    both = np.concatenate([up_F, down_F]), np.concatenate([down_F, up_F])
    return Phase(*both, np.full(2 * len(up_F), 0.5), 2 * depth, 2 * chain)


def _hierarchical(
    what: Collective,
    rank_N: Ints,
    by_node: Sequence[Ints],
    bytes_NN: Floats | None,
    direct: Callable[..., Phase],
    near_share: float = 1.0,
) -> tuple[Phase, ...]:
    inside, nodes = len(by_node[0]), len(by_node)
    if len({len(row) for row in by_node}) > 1:
        counts = ", ".join(str(len(row)) for row in by_node)
        raise ValueError(f"hierarchical {what.value}: its nodes hold {counts} ranks, not equally many; choose another algorithm")
    rank_MD = np.stack(by_node)
    if bytes_NN is None and what is Collective.ALL_TO_ALL:
        near_phase = _side_by_side([direct(row, False, 1) for row in by_node], near_share)
        return near_phase, _side_by_side([direct(rank_MD[:, d], True, 1) for d in range(inside)])
    if bytes_NN is not None:
        place = {rank: i for i, rank in enumerate(rank_N.tolist())}
        order_N = np.array([place[rank] for rank in rank_MD.ravel().tolist()])
        sent_MDMD = bytes_NN[np.ix_(order_N, order_N)].reshape(nodes, inside, nodes, inside)
        near = [_direct(row, False, 1, sent_MDMD[m].sum(1)) for m, row in enumerate(by_node)]
        far = [_direct(rank_MD[:, d], True, 1, sent_MDMD[:, :, :, d].sum(1)) for d in range(inside)]
        return _side_by_side(near), _side_by_side(far)
    near_phase = _side_by_side([direct(row, False, 1) for row in by_node])
    columns = [_rings([rank_MD[m : m + 1, d] for m in range(nodes)], what.rounds, 1) for d in range(inside)]
    far_phase = _side_by_side(columns, 1 / inside)
    before = () if what is Collective.ALL_GATHER else (near_phase,)
    after = () if what is Collective.REDUCE_SCATTER else (near_phase,)
    return (*before, far_phase, *after)


def _side_by_side(phases: Sequence[Phase], share: float = 1.0) -> Phase:
    joined = [np.concatenate([getattr(p, name) for p in phases]) for name in ("source_F", "target_F", "bytes_F")]
    counts = [np.ones(len(p.bytes_F), int) if p.count_F is None else p.count_F for p in phases]
    hops = max(p.hops for p in phases), max(p.fast_hops for p in phases)
    return Phase(joined[0], joined[1], joined[2] * share, *hops, np.concatenate(counts))
