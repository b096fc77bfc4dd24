"""The lists of all ranks walked together in virtual time, a clock of numbers alone: how long a step takes, who is idle when."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from megalina.step.pipeline.cell import COMPUTED, INPUTS_DONE, RECEIVES, SENDS, Cell, CellList, Entry, Pipeline, Work, entry_text


@dataclass(frozen=True, slots=True)
class Times:
    """What cells take, in any unit, seconds say.  `forward`, `inputs` and `weights` are of all layers of a rank for one
    micro-batch, of which a stage has its share; whole backward takes inputs + weights."""

    forward: float = 1.0
    inputs: float = 1.0
    weights: float = 1.0
    message: float = 0.0  # from a stage to its neighbour on another rank
    pair: float = 1.0  # a forward and a backward whose instructions take turns take so much of their sum
    shares: tuple[float, ...] = ()  # of each stage, of a rank's layers; (): all chunks alike

    @property
    def backward(self) -> float:
        return self.inputs + self.weights

    def of(self, cell: Cell, chunks: int) -> float:
        whole = {
            Work.FORWARD: self.forward,
            Work.BACKWARD: self.backward,
            Work.INPUT_GRADIENTS: self.inputs,
            Work.WEIGHT_GRADIENTS: self.weights,
        }.get(cell.work, 0.0)
        return whole * (self.shares[cell.stage] if self.shares else 1 / chunks)

    def of_entry(self, entry: Entry, chunks: int) -> float:
        return sum(self.of(cell, chunks) for cell in entry) * (self.pair if len(entry) > 1 else 1.0)


UNIT = Times()


@dataclass(frozen=True, slots=True)
class Span:
    """When a rank computed an entry of its list."""

    entry: Entry
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Walked:
    spans: tuple[tuple[Span, ...], ...]  # of each rank, what it computed, in order

    @property
    def makespan(self) -> float:
        return max(spans[-1].end for spans in self.spans if spans)

    @property
    def busy(self) -> tuple[float, ...]:
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def idle(self) -> tuple[float, ...]:
        """Of each rank, within the step: its bubble, with what it waits for messages."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def shifted_idle(self) -> tuple[float, ...]:
        """Of each rank, between its own first cell and its own last: the bubble where nothing ties the ranks' steps together
        (zero-bubble papers draw it as a parallelogram)."""
        return tuple(
            (spans[-1].end - spans[0].start if spans else 0.0) - busy for spans, busy in zip(self.spans, self.busy, strict=True)
        )


class Stuck(ValueError):
    """The ranks wait for one another, or for what nobody does."""


def needs_of(cell: Cell, pipeline: Pipeline) -> Iterator[Cell]:
    """The cells whose results a cell takes, of itself and of its neighbours; whole backward may stand for I and W."""
    stage, number = cell.stage, cell.micro_batch
    if cell.work is Work.FORWARD and stage > 0:
        yield Cell(Work.FORWARD, stage - 1, number)
    elif cell.work in INPUTS_DONE:
        yield Cell(Work.FORWARD, stage, number)
        if stage < pipeline.stages - 1:
            yield Cell(Work.INPUT_GRADIENTS, stage + 1, number)
    elif cell.work is Work.WEIGHT_GRADIENTS:
        yield Cell(Work.INPUT_GRADIENTS, stage, number)


def gives_of(cell: Cell) -> Cell:
    """What others know a computed cell's result by: whole backward gives what the gradients of inputs do."""
    return Cell(Work.INPUT_GRADIENTS, cell.stage, cell.micro_batch) if cell.work is Work.BACKWARD else cell


def message_of(result: Cell, to_stage: int) -> Cell:
    """The RECV that brings a neighbour's result to a stage of another rank."""
    work = Work.RECV_ACTIVATIONS if result.work is Work.FORWARD else Work.RECV_GRADIENTS
    return Cell(work, to_stage, result.micro_batch)


def asked_before(cells: CellList, position: int) -> Entry:
    """The RECVs that a rank asks for before it begins an entry, though they stand behind it: they may come meanwhile.  Not those
    behind a SEND of the same batch, since both ranks would have the two in different orders then."""
    following = cells[position + 1] if position + 1 < len(cells) else ()
    return tuple(takewhile(lambda cell: cell.work in RECEIVES, following))


@dataclass(slots=True)
class _Walk:
    pipeline: Pipeline
    times: Times
    meet: bool
    messages: bool  # whether the lists have SEND and RECV
    chunks: int
    at: list[int] = field(default_factory=list)  # of each rank: position in its list
    clock: list[float] = field(default_factory=list)
    given: dict[Cell, float] = field(default_factory=dict)  # results of cells
    posted: dict[Cell, float] = field(default_factory=dict)  # messages: when its own rank came to it
    spans: list[list[Span]] = field(default_factory=list)

    def arrival(self, message: Cell) -> float | None:
        """When both ends have come to a message, and it has been sent; None: they haven't."""
        here, there = self.posted.get(message), self.posted.get(message.other_end)
        return max(here, there) + self.times.message if here is not None and there is not None else None

    def ready(self, rank: int, need: Cell, cell: Cell) -> float | None:
        """When a rank has what one of its cells needs."""
        if self.pipeline.rank_of[need.stage] == rank:
            return self.given.get(need)
        if self.messages:
            return self.arrival(message_of(need, cell.stage))
        return self.given[need] + self.times.message if need in self.given else None

    def go(self, rank: int) -> bool:
        """Whether the rank could do the next entry of its list."""
        entry = self.pipeline.lists[rank][self.at[rank]]
        if entry[0].work in SENDS or entry[0].work in RECEIVES:
            for message in entry:
                self.posted.setdefault(message, self.clock[rank])
            arrivals = [self.arrival(message) for message in entry]
            if self.meet:
                if any(arrival is None for arrival in arrivals):
                    return False
                self.clock[rank] = max(arrival for arrival in arrivals if arrival is not None)
        elif entry[0].work in COMPUTED:
            ready = [self.ready(rank, need, cell) for cell in entry for need in needs_of(cell, self.pipeline)]
            if any(when is None for when in ready):
                return False
            start = max([self.clock[rank], *(when for when in ready if when is not None)])
            self.clock[rank] = start + self.times.of_entry(entry, self.chunks)
            self.spans[rank].append(Span(entry, start, self.clock[rank]))
            self.given.update(dict.fromkeys(map(gives_of, entry), self.clock[rank]))
            if not self.meet:
                for message in asked_before(self.pipeline.lists[rank], self.at[rank]):
                    self.posted.setdefault(message, start)
        self.at[rank] += 1
        return True

    def missing(self, rank: int) -> Cell:
        """What a rank that stands still waits for: a result, or the other end of a message."""
        entry = self.pipeline.lists[rank][self.at[rank]]
        for cell in entry:
            if cell.work in SENDS or cell.work in RECEIVES:
                if self.arrival(cell) is None:
                    return cell.other_end
            for need in needs_of(cell, self.pipeline):
                if self.ready(rank, need, cell) is None:
                    message = message_of(need, cell.stage)
                    own = self.pipeline.rank_of[need.stage] == rank or not self.messages
                    return need if own else message.other_end if message in self.posted else message
        raise AssertionError(f"rank {rank} could go on")


def walk(pipeline: Pipeline, times: Times = UNIT, *, meet: bool = False) -> Walked:
    """Every rank goes through its list in order; a cell begins when its rank is free and has what it needs.

    A message is sent when both ranks have come to it (to its end alone where lists have no SEND and RECV), takes its time, and
    holds up nobody but the cell that reads it; a RECV is asked for before the cell in front of it (`asked_before`).  `meet`:
    rendezvous, the strictest reading of a list: a rank stands still at its messages until all of a batch have been sent.  Stuck,
    with the circle, where there is no end."""
    ranks = pipeline.ranks
    state = _Walk(pipeline, times, meet, pipeline.has_messages, pipeline.stages // ranks)
    state.at, state.clock, state.spans = [0] * ranks, [0.0] * ranks, [[] for _ in range(ranks)]
    before, now = -1, 0
    while now > before:
        before = now
        for rank in range(ranks):
            while state.at[rank] < len(pipeline.lists[rank]) and state.go(rank):
                pass
        now = sum(state.at) + len(state.posted)
    standing = [rank for rank in range(ranks) if state.at[rank] < len(pipeline.lists[rank])]
    if standing:
        raise Stuck(_circle(state, standing))
    return Walked(tuple(map(tuple, state.spans)))


def _circle(state: _Walk, standing: list[int]) -> str:
    """The ranks that wait for one another, or the first that waits for what nobody does."""
    pipeline, places = state.pipeline, dict[Cell, tuple[int, int, Cell]]()
    for rank in range(pipeline.ranks):
        for position, cell in pipeline.cells(rank):
            places.setdefault(gives_of(cell), (rank, position, cell))
    way: list[int] = []
    rank = standing[0]
    while rank not in way:
        way.append(rank)
        missing = state.missing(rank)
        if missing not in places:
            return f"{_stands(state, rank)} for {missing}, which no list has"
        rank = places[missing][0]
    lines = []
    for waiting in way[way.index(rank) :]:
        holder, position, cell = places[state.missing(waiting)]
        behind = entry_text(pipeline.lists[holder][state.at[holder]])
        later = f" behind {behind}" if position > state.at[holder] else ""
        lines.append(f"{_stands(state, waiting)} for {cell}, which rank {holder} has at position {position}{later}")
    return "the lists never end: " + "; ".join(lines)


def _stands(state: _Walk, rank: int) -> str:
    entry = state.pipeline.lists[rank][state.at[rank]]
    return f"rank {rank} at position {state.at[rank]}, {entry_text(entry)}, waits"
