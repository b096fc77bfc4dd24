"""ZB-H1: 1F1B whose gradients of weights come later and fill the bubbles of its end (Zero Bubble Pipeline Parallelism,
arXiv:2401.10241, section 3.1); with several chunks as torch's ScheduleInterleavedZeroBubble has it (ZB1P).

A rank owes the gradients of weights of as many cells as its number: the last rank, which has the fewest micro-batches in work
otherwise, of the most.  So all ranks hold equally much until weights are done."""

from megalina.step.pipeline.cell import CellList, Entry, forward, input_gradients, weight_gradients
from megalina.step.pipeline.schedules.interleaved import refuse as refuse_odd_groups
from megalina.step.pipeline.schedules.interleaved import turns_of
from megalina.step.pipeline.schedules.schedule import Schedule, Size, refuse_pairs


def zb_h1(size: Size) -> list[CellList]:
    ranks, total, chunks = size.ranks, size.chunks * size.micro_batches, range(size.chunks)
    lists = []
    for rank in range(ranks):
        forwards, backwards = turns_of(size, rank, chunks), turns_of(size, rank, chunks[::-1])
        warm_up = size.chunks * ranks - 1 - rank
        cells: list[Entry] = [forward(*turn) for turn in forwards[:warm_up]]
        for number in range(total):
            cells += [forward(*turn) for turn in forwards[warm_up + number : warm_up + number + 1]]
            cells.append(input_gradients(*backwards[number]))
            cells += [weight_gradients(*backwards[number - rank])] if number >= rank else []
        cells += [weight_gradients(*owed) for owed in backwards[max(0, total - rank) :]]
        lists.append(tuple(cells))
    return lists


def peak(size: Size, rank: int) -> float:
    return min(size.chunks * size.ranks - rank, size.chunks * size.micro_batches) / size.chunks


def refuse(size: Size) -> None:
    refuse_pairs(size, "it has as few forwards in front as 1f1b has, with which pairs wait for one another in a circle")
    if size.chunks > 1:
        refuse_odd_groups(size)


def bubble(size: Size) -> float | None:
    if size.micro_batches < size.ranks:
        return None
    return (size.ranks - 1) * (size.times.forward + size.times.inputs - size.times.weights) / size.chunks


SCHEDULE = Schedule(
    "zb_h1",
    "Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.1",
    zb_h1,
    chunks=0,
    refuse=refuse,
    bubble=bubble,
    peak=peak,
)
