"""All forwards, then all backwards (GPipe, arXiv:1811.06965, section 2.3)."""

from megalina.step.pipeline.cell import CellList, backward, forward
from megalina.step.pipeline.schedules.schedule import Schedule, Size, refuse_pairs


def gpipe(size: Size) -> list[CellList]:
    numbers = range(size.micro_batches)
    return [(*(forward(rank, i) for i in numbers), *(backward(rank, i) for i in numbers)) for rank in range(size.ranks)]


SCHEDULE = Schedule(
    "gpipe",
    "GPipe, arXiv:1811.06965, section 2.3",
    gpipe,
    refuse=lambda size: refuse_pairs(size, "backwards begin when all forwards are done"),
    bubble=lambda size: (size.ranks - 1) * (size.times.forward + size.times.backward),
    peak=lambda size, rank: size.micro_batches,
)
