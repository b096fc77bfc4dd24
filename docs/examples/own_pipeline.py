"""A pipeline schedule of your own: 1F1B in which a forward and a backward take turns (after Megatron-LM's combined 1F1B).

A pair ends late for both of its halves, so each hop needs the slack of a pair both ways: twice as many forwards first.  Run
python tools/pipelines.py docs/examples/own_pipeline.py:SCHEDULE --stages 4 --micro-batches 16 --pair 0.8"""

from megalina.step.pipeline.cell import CellList, Entry, backward, forward
from megalina.step.pipeline.schedules.schedule import Schedule, Size


def paired_1f1b(size: Size) -> list[CellList]:
    m = size.micro_batches
    lists = []
    for rank in range(size.ranks):
        warm_up = min(m, 2 * (size.ranks - 1 - rank) + 1)
        cells: list[Entry] = [forward(rank, i) for i in range(warm_up)]
        for i in range(m):
            pair = forward(rank, warm_up + i) if warm_up + i < m else ()
            cells.append((*pair, *backward(rank, i)))
        lists.append(tuple(cells))
    return lists


SCHEDULE = Schedule(
    "paired_1f1b",
    "after Megatron-LM's combined 1F1B",
    paired_1f1b,
    peak=lambda size, rank: min(size.micro_batches, 2 * (size.ranks - rank)),
)
