"""A link: which numbers of one tensor are which numbers of another.

A link says that a view of a Hugging Face tensor ("theirs") is a view of one of ours.  Reshaping, slicing and reordering of dims
on either side say all that differs between formats: experts stacked in one tensor, gate and up one behind the other, transposed
matrices, interleaved columns, the pairs of RoPE.  Both ways are copies between the same two views, so what goes in comes out to
the last bit.  No torch: `megalina/checkpoint/hugging_face/views.py` copies.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Index = int | slice


@dataclass(frozen=True, slots=True)
class View:
    """The tensor `name`, of shape `shape`, reshaped to `split` (each dim in one or several; (): as it is), then indexed along its
    first dims by `at`, then its dims put in the order `order` ((): as they are)."""

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...] = ()
    at: tuple[Index, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        whole = self.split or self.shape
        if math.prod(whole) != math.prod(self.shape) or len(self.at) > len(whole):
            raise ValueError(f"{self.name} {list(self.shape)} can't be viewed as {list(whole)} at {self.at}")
        if self.order and sorted(self.order) != list(range(len(self._cut()))):
            raise ValueError(f"{self.name}: {self.order} is no order of {len(self._cut())} dims")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The view's shape."""
        cut = self._cut()
        return tuple(cut[dim] for dim in self.order) if self.order else cut

    @property
    def first(self) -> int | None:
        """The one index of the tensor's first dim that this view is of; None where it is of several, or of cut dims."""
        return self.at[0] if self.at and not self.split and isinstance(self.at[0], int) else None

    def _cut(self) -> tuple[int, ...]:
        whole = self.split or self.shape
        kept = [len(range(size)[at]) for size, at in zip(whole, self.at) if isinstance(at, slice)]
        return (*kept, *whole[len(self.at) :])


@dataclass(frozen=True, slots=True)
class Link:
    theirs: View
    ours: View

    def __post_init__(self) -> None:
        if self.theirs.sizes != self.ours.sizes:
            theirs, ours = list(self.theirs.sizes), list(self.ours.sizes)
            raise ValueError(f"{self.theirs.name} {theirs} is linked to {self.ours.name} {ours}, of another shape")


def same(theirs: str, ours: str, *shape: int) -> Link:
    """The one tensor is the other."""
    return Link(View(theirs, shape), View(ours, shape))


def uncovered(views: Iterable[View]) -> dict[str, int]:
    """Name -> elements of the tensor that its views leave out; below zero where they have some twice.  Of names without either
    nothing is said."""
    left: dict[str, int] = {}
    for view in views:
        left[view.name] = left.get(view.name, math.prod(view.shape)) - math.prod(view.sizes)
    return {name: count for name, count in left.items() if count}
