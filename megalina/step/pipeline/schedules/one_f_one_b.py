"""1F1B: a rank's first backward comes as soon as it can, then one forward and one backward in turn (PipeDream-flush,
arXiv:2006.09503; Megatron-LM, arXiv:2104.04473, section 2.2.1)."""

from megalina.step.pipeline.cell import CellList, Entry, backward, forward
from megalina.step.pipeline.schedules.schedule import Schedule, Size


def one_f_one_b(size: Size) -> list[CellList]:
    m = size.micro_batches
    lists = []
    for rank in range(size.ranks):
        warm_up = min(m, size.ranks - 1 - rank)
        cells: list[Entry] = [forward(rank, i) for i in range(warm_up)]
        for i in range(m):
            cells += [forward(rank, warm_up + i)] if warm_up + i < m else []
            cells.append(backward(rank, i))
        lists.append(tuple(cells))
    return lists


SCHEDULE = Schedule(
    "1f1b",
    "PipeDream-flush, arXiv:2006.09503; Megatron-LM, arXiv:2104.04473, section 2.2.1",
    one_f_one_b,
    bubble=lambda size: (size.ranks - 1) * (size.times.forward + size.times.backward),
    peak=lambda size, rank: min(size.micro_batches, size.ranks - rank),
)
