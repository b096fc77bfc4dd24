"""Interleaved 1F1B: micro-batches go in groups of as many as there are ranks, each group through one chunk after another, so the
bubble is that of a chunk (Megatron-LM, arXiv:2104.04473, section 2.2.2).

In pairs one forward more comes first, as in Megatron-LM's combined 1F1B: else the first pair of the last rank would be a forward
and its own backward."""

from collections.abc import Sequence

from megalina.step.pipeline.cell import CellList, backward, forward
from megalina.step.pipeline.schedules.one_f_one_b import in_turn
from megalina.step.pipeline.schedules.schedule import Schedule, Size


def interleaved(size: Size) -> list[CellList]:
    chunks, lists = range(size.chunks), []
    for rank in range(size.ranks):
        forwards = [forward(*turn) for turn in turns_of(size, rank, chunks)]
        backwards = [backward(*turn) for turn in turns_of(size, rank, chunks[::-1])]
        lists.append(in_turn(forwards, backwards, warm_up=warm_up_of(size, rank), paired=size.paired))
    return lists


def warm_up_of(size: Size, rank: int) -> int:
    """Forwards before the first backward, or before the first pair."""
    return (size.chunks - 1) * size.ranks + 2 * (size.ranks - 1 - rank) + size.paired


def turns_of(size: Size, rank: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Stage and micro-batch of a rank's cells of one kind, in order; each group goes through `chunks` in this order."""
    numbers = range(size.micro_batches)
    groups = [numbers[first : first + size.ranks] for first in numbers[:: size.ranks]]
    return [(chunk * size.ranks + rank, i) for group in groups for chunk in chunks for i in group]


def refuse(size: Size) -> None:
    if over := size.micro_batches % size.ranks:
        less, more = size.micro_batches - over, size.micro_batches - over + size.ranks
        raise ValueError(
            f"micro-batches go through chunks in groups of as many as there are ranks, so {size.micro_batches} of them must be "
            f"a multiple of {size.ranks} ranks: take {f'{less} or ' if less else ''}{more}"
        )


def peak(size: Size, rank: int) -> float:
    return min(warm_up_of(size, rank) + 1, size.chunks * size.micro_batches) / size.chunks


SCHEDULE = Schedule(
    "interleaved",
    "Megatron-LM, arXiv:2104.04473, section 2.2.2",
    interleaved,
    chunks=0,
    refuse=refuse,
    bubble=lambda size: (size.ranks - 1) * (size.times.forward + size.times.backward) / size.chunks,
    peak=peak,
)
