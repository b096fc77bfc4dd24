"""A schedule: a pure function from (ranks, chunks, micro-batches) to a list of cells a rank, and what is known of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from megalina.step.pipeline.cell import CellList, Pipeline, loop
from megalina.step.pipeline.walk import Times


@dataclass(frozen=True, slots=True)
class Size:
    """What a schedule is for."""

    ranks: int  # P
    chunks: int  # V, stages that each rank holds
    micro_batches: int  # m
    times: Times = field(default_factory=Times)  # `greedy` alone goes by them, and
    most_live: float = 0.0  # by how many micro-batches of activations a rank has room for, 0: as many as there are ranks
    paired: bool = False  # a forward and a backward go together where they can (`strategy=pair`)

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks


class Bubble(Protocol):
    def __call__(self, size: Size) -> float | None: ...


class Peak(Protocol):
    def __call__(self, size: Size, rank: int) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """`cells` gives each rank's list; `refuse` raises ValueError for numbers that it isn't made for, and for pairs where none can
    be.

    Formulas are of `size.times` without messages and where all stages are alike; None where there is none.  `bubble`: what a rank
    stands idle in a step; `peak`: the most activations that a rank holds at once, in micro-batches of all its layers, until the
    gradients of inputs are there.  `bubble_is_bound`: a walk may find less."""

    name: str
    source: str  # paper and section
    cells: Callable[[Size], list[CellList]]
    placement: Callable[[int, int], tuple[int, ...]] = loop  # (ranks, chunks) -> the rank of each stage
    chunks: int = 1  # those that it is made for; 0: any number
    refuse: Callable[[Size], None] = lambda size: None
    bubble: Bubble = lambda size: None
    peak: Peak = lambda size, rank: None
    bubble_is_bound: bool = False

    def pipeline(self, size: Size) -> Pipeline:
        """The lists, without messages.  ValueError, with the numbers and what to change, for what the schedule isn't made for."""
        if size.ranks < 1 or size.chunks < 1 or size.micro_batches < 1:
            raise ValueError(
                f"ranks {size.ranks}, chunks {size.chunks}, micro-batches {size.micro_batches}: each must be at least 1"
            )
        if self.chunks and size.chunks != self.chunks:
            raise ValueError(
                f"{self.name} has {_chunks(self.chunks)} on each rank, not {size.chunks}: set chunks to {self.chunks}"
            )
        if size.times.shares and len(size.times.shares) != size.stages:
            raise ValueError(
                f"times have shares of {len(size.times.shares)} stages, and there are {size.stages}: give one for each"
            )
        self.refuse(size)
        return Pipeline(tuple(self.cells(size)), self.placement(size.ranks, size.chunks), size.micro_batches)


def refuse_pairs(size: Size, why: str) -> None:
    """ValueError where pairs are asked for, of a schedule that can't have any; `why`: follows "there are no pairs, as"."""
    if size.paired:
        raise ValueError(
            f"there are no pairs of a forward and a backward, as {why}: take 1f1b, interleaved or dualpipev, or another strategy "
            "than pair"
        )


def _chunks(number: int) -> str:
    return "one chunk" if number == 1 else f"{number} chunks"
