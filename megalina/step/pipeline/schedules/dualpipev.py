"""DualPipeV: two chunks a rank on a V; in the long middle a forward and a backward of the two stand side by side, in pairs so
that one computes while the other's tokens are on the wire (DeepSeek-V3 technical report, arXiv:2412.19437, section 3.2.1;
DualPipe's README)."""

from megalina.step.pipeline.cell import CellList, v_shape
from megalina.step.pipeline.schedules.schedule import Schedule, Size
from megalina.step.pipeline.schedules.words import cells_of


def dualpipev(size: Size) -> list[CellList]:
    ranks = size.ranks
    lists = []
    for rank in range(ranks):
        after, half = ranks - 1 - rank, (rank + 1) // 2
        middle = size.micro_batches - 2 * ranks + rank + 1
        first = "Fa+Bb" if after else "Fa Bb"  # at the turn both would wait for each other's hop
        words = (
            "Fa " * (2 * after)
            + "Fa Fb " * (rank + 1)
            + "Ib W Fb " * after
            + f"{first} Fb+Ba "
            + "Fa+Bb Fb+Ba " * (middle - 1)
            + "Bb Fb+Ba " * after
            + "Bb Ba " * half
            + ("Ib Ia " * half if rank % 2 else "Bb Ia " + "Ib Ia " * half)
            + "W Ia " * after
            + "W " * (rank + 1)
        )
        lists.append(cells_of(words if size.paired else words.replace("+", " "), (rank, 2 * ranks - 1 - rank)))
    return lists


def refuse(size: Size) -> None:
    if size.micro_batches < 2 * size.ranks:
        raise ValueError(
            f"dualpipev needs twice as many micro-batches as ranks, {2 * size.ranks}, to fill both halves of its V, and there "
            f"are {size.micro_batches}: take {2 * size.ranks} or more, or at most {size.micro_batches // 2} ranks"
        )


def bubble(size: Size) -> float:
    """(P - 1) (F&B + B - 3 W) of chunks, as DualPipe's README has it, a pair F&B counted with what it saves."""
    t = size.times
    return (size.ranks - 1) * (t.pair * (t.forward + t.backward) + t.backward - 3 * t.weights) / 2


SCHEDULE = Schedule(
    "dualpipev",
    "DeepSeek-V3, arXiv:2412.19437, section 3.2.1; DualPipe's README, DualPipeV",
    dualpipev,
    placement=v_shape,
    chunks=2,
    refuse=refuse,
    bubble=bubble,
    peak=lambda size, rank: size.ranks + 0.5,
    bubble_is_bound=True,
)
