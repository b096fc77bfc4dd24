"""1F1B: a rank's first backward comes as soon as it can, then one forward and one backward in turn (PipeDream-flush,
arXiv:2006.09503; Megatron-LM, arXiv:2104.04473, section 2.2.1).

In pairs, as in Megatron-LM's combined 1F1B, it is `interleaved` with one chunk: a pair ends late for both of its halves, so each
hop needs the slack of a pair both ways, and nearly twice as many forwards come first.  With 1F1B's own number of them pairs close
a circle."""

from collections.abc import Sequence

from megalina.step.pipeline.cell import CellList, Entry, backward, forward
from megalina.step.pipeline.schedules.schedule import Schedule, Size


def one_f_one_b(size: Size) -> list[CellList]:
    m = size.micro_batches
    lists = []
    for rank in range(size.ranks):
        after = size.ranks - 1 - rank
        warm_up = 2 * after + 1 if size.paired else after
        cells = [forward(rank, i) for i in range(m)], [backward(rank, i) for i in range(m)]
        lists.append(in_turn(*cells, warm_up=warm_up, paired=size.paired))
    return lists


def in_turn(forwards: Sequence[Entry], backwards: Sequence[Entry], *, warm_up: int, paired: bool) -> CellList:
    """So many forwards, then a forward and a backward in turn, or as one pair; backwards are left at the end."""
    cells = list(forwards[:warm_up])
    for number, backward_cell in enumerate(backwards):
        forward_cell = forwards[warm_up + number] if warm_up + number < len(forwards) else ()
        if paired:
            cells.append((*forward_cell, *backward_cell))
        else:
            cells += [forward_cell, backward_cell] if forward_cell else [backward_cell]
    return tuple(cells)


SCHEDULE = Schedule(
    "1f1b",
    "PipeDream-flush, arXiv:2006.09503; Megatron-LM, arXiv:2104.04473, section 2.2.1",
    one_f_one_b,
    bubble=lambda size: (size.ranks - 1) * (size.times.forward + size.times.backward),
    peak=lambda size, rank: min(size.micro_batches, (size.ranks - rank) * (2 if size.paired else 1)),
)
