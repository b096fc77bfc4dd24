"""ZB-V: two chunks a rank on a V, so that the first rank has the last stage and starts backward at once; gradients of weights
fill what is left (Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 6)."""

from megalina.step.pipeline.cell import CellList, v_shape
from megalina.step.pipeline.schedules.schedule import Schedule, Size, refuse_pairs
from megalina.step.pipeline.schedules.words import cells_of


def zbv(size: Size) -> list[CellList]:
    """With fewer than 2 P - 1 micro-batches the list of so many, without those that aren't there."""
    ranks, m = size.ranks, max(2 * size.ranks - 1, size.micro_batches)
    lists = []
    for rank in range(ranks):
        after = ranks - rank
        words = (
            "Fa " * (2 * after - 1)
            + "Fb Fa " * rank
            + "Fb Ib Wb " * after
            + "Fa Ia Wa Fb Ib Wb " * (m - 2 * ranks + 1 + rank)
            + "Ia Wa Fb Ib Wb " * (after - 1)
            + "Ia Ib " * rank
            + "Ia Wa " * after
            + "Wb " * rank
            + "Wa " * rank
        )
        cells = cells_of(words, (rank, 2 * ranks - 1 - rank))
        lists.append(tuple(entry for entry in cells if (entry[0].micro_batch or 0) < size.micro_batches))
    return lists


def bubble(size: Size) -> float | None:
    """Fitted to walks of the list, for W up to F and I.  Between a rank's own first and last cell it is the idle time of
    (P - 1) (max(F, I) - W): none where all three are alike."""
    if size.micro_batches < 2 * size.ranks - 1:
        return None
    return (size.ranks - 1) * max(size.times.forward, size.times.inputs) / 2


def peak(size: Size, rank: int) -> float | None:
    return size.ranks if size.micro_batches >= 2 * size.ranks - 1 else None


SCHEDULE = Schedule(
    "zbv",
    "Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 6",
    zbv,
    placement=v_shape,
    chunks=2,
    refuse=lambda size: refuse_pairs(size, "its backwards follow forwards without the slack that a pair needs at each hop"),
    bubble=bubble,
    peak=peak,
)
