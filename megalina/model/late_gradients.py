"""Gradients of weights that a backward pass left out, to be added later: those of several parts as one product."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LateGradient:
    """What adds the gradients of the weights of one product.

    `rows`: tensors that have the same rows, [N, ...], which `add` takes in this order.  `count_E`: rows are sorted by expert, so
    many of each, and `add` takes that after the rows; None: they are not."""

    add: Callable[..., None]
    rows: tuple[Tensor, ...]
    count_E: list[int] | None = None

    def __call__(self) -> None:
        self.add(*self.rows) if self.count_E is None else self.add(*self.rows, self.count_E)


Later = list[LateGradient]  # of a function, in the order of its backward pass


def joined(parts: Sequence[LateGradient]) -> LateGradient:
    """The same product with the rows of all parts, which are copied: the sum is read and written once."""
    if len(parts) == 1:
        return parts[0]
    counts = [part.count_E for part in parts if part.count_E is not None]
    assert len(counts) in (0, len(parts)), "some parts are sorted by expert, some are not"
    same = zip(*(part.rows for part in parts), strict=True)
    if not counts:
        return replace(parts[0], rows=tuple(map(torch.cat, same)))
    rows = tuple(_by_expert(of_parts, counts) for of_parts in same)
    return replace(parts[0], rows=rows, count_E=[sum(of_expert) for of_expert in zip(*counts, strict=True)])


def _by_expert(of_parts: Sequence[Tensor], counts: Sequence[list[int]]) -> Tensor:
    """Rows of all parts, again sorted by expert."""
    pieces = [rows.split(count_E) for rows, count_E in zip(of_parts, counts, strict=True)]
    return torch.cat([piece for of_expert in zip(*pieces, strict=True) for piece in of_expert])
