"""A schedule made from times and room for activations: each rank, when it is free, takes what is there (after the heuristics of
Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.1, and its zbv_greedy).  Stages may differ in what they take."""

from collections import Counter
from collections.abc import Mapping, Sequence

from megalina.step.pipeline.cell import Cell, CellList, Entry, Pipeline, Work, v_shape
from megalina.step.pipeline.schedules.schedule import Schedule, Size, refuse_pairs
from megalina.step.pipeline.walk import walk

F, B, W = Work.FORWARD, Work.INPUT_GRADIENTS, Work.WEIGHT_GRADIENTS
PREFERRED = ({F: (B, F), B: (F, B)}, {F: (B, F), B: (B, F)}, {F: (F, B), B: (F, B)})  # by what a rank did last


def greedy(size: Size) -> list[CellList]:
    """The shortest step of three: forwards and backwards in turn, backwards first, forwards first."""
    made = [_Greedy(size, preferred).lists() for preferred in PREFERRED]
    rank_of = v_shape(size.ranks, size.chunks)
    return min(made, key=lambda lists: walk(Pipeline(tuple(lists), rank_of, size.micro_batches), size.times).makespan)


class _Greedy:
    """Gradients of weights go where nothing else comes for half of their time.  A forward leaves room for one more in each later
    chunk of its rank, so the oldest micro-batch always comes through."""

    def __init__(self, size: Size, preferred: Mapping[Work, Sequence[Work]]):
        self.size, self.preferred, self.rank_of = size, preferred, v_shape(size.ranks, size.chunks)
        self.room = int((size.most_live or size.ranks) * size.chunks)  # in micro-batches of a chunk, until weights are done
        self.ready = {Cell(F, 0, i): 0.0 for i in range(size.micro_batches)}
        self.free, self.live, self.last = [0.0] * size.ranks, [0] * size.ranks, [B] * size.ranks
        self.done = Counter[tuple[Work, int]]()
        self.owed: list[list[Cell]] = [[] for _ in range(size.ranks)]

    def lists(self) -> list[CellList]:
        out: list[list[Entry]] = [[] for _ in range(self.size.ranks)]
        best = {rank: self.best(rank) for rank in range(self.size.ranks)}
        while open_ := [option for option in best.values() if option is not None]:
            when, _, _, cell = min(open_, key=lambda option: option[:3])
            rank = self.rank_of[cell.stage]
            out[rank].append((cell,))
            self.take(rank, cell, self.free[rank] if cell.work is W else when)
            stage = {F: cell.stage + 1, B: cell.stage - 1}.get(cell.work, -1)
            following = Cell(cell.work, stage, cell.micro_batch)
            if stage == self.size.stages:
                following = Cell(B, cell.stage, cell.micro_batch)  # of the last forward
            if stage >= 0:
                there = self.rank_of[following.stage]
                self.ready[following] = self.free[rank] + (self.size.times.message if there != rank else 0.0)
                best[there] = self.best(there)
            best[rank] = self.best(rank)
        return [tuple(cells) for cells in out]

    def take(self, rank: int, cell: Cell, start: float) -> None:
        self.free[rank] = start + self.size.times.of(cell, self.size.chunks)
        self.done[cell.work, cell.stage] += 1
        self.live[rank] += {F: 1, B: 0, W: -1}[cell.work]
        if cell.work is W:
            self.owed[rank].pop(0)
            return
        self.last[rank] = cell.work
        if cell.work is B:
            self.owed[rank].append(Cell(W, cell.stage, cell.micro_batch))

    def best(self, rank: int) -> tuple[float, int, int, Cell] | None:
        """When a rank's next cell could begin, and the cell; of several at one time the preferred kind, late stages first."""
        found = [(self.free[rank] + self.size.times.of(w, self.size.chunks) / 2, 2, 0, w) for w in self.owed[rank][:1]]
        for stage in (stage for stage, holder in enumerate(self.rank_of) if holder == rank):
            later = self.size.chunks - 1 - stage // self.size.ranks
            for turn, work in enumerate(self.preferred[self.last[rank]]):
                cell = Cell(work, stage, self.done[work, stage])
                if cell in self.ready and (work is B or self.live[rank] + 1 + later <= self.room):
                    found.append((max(self.free[rank], self.ready[cell]), turn, -stage, cell))
        return min(found, key=lambda option: option[:3], default=None)


def refuse(size: Size) -> None:
    refuse_pairs(size, "it takes one cell after another, whichever is ready")
    if size.most_live and size.most_live < 1:
        raise ValueError(
            f"room for {size.most_live:g} micro-batches of activations on a rank: one goes through all of its chunks at least, "
            "so give 1 or more"
        )


SCHEDULE = Schedule(
    "greedy",
    "after Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.1",
    greedy,
    placement=v_shape,
    chunks=0,
    refuse=refuse,
)
