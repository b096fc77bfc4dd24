"""The virtual cluster: ranks that walk their programs in virtual time, with the lanes and links of the real one.

Each rank has one device, which computes in the program's order, and one lane per axis of the mesh, in which what it starts
leaves in order (`megalina/comm/links.py`).  The n-th collective of a group begins when every rank has started its n-th
there, and moves its bytes over the links of its ranks, which all that is on them shares.  A host that runs ahead of its
device gives the same times: what is sent leaves when the device is there.
"""

import heapq
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalina.step.program import Kind, Op, Program, Stage, reads_of, writes_of
from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event, Recorder

Group = tuple[str, tuple[int, ...]]  # axis, ranks
RanksOf = Callable[[str, int], tuple[int, ...]]  # the ranks of an axis that a rank talks to, itself among them
Seconds = Callable[[int, Stage], float]  # of a rank: COMPUTE: takes; START: until it can leave; WAIT: takes after the arrival
MOVABLE = (Op.GRADS, Op.PARAMS)


class Deadlock(RuntimeError):
    """No rank can go on; the message says where each stands and what each of its lanes waits for."""


@dataclass(frozen=True, slots=True)
class Wire:
    """Every rank has a link of its own, both ways at once, whose rate is shared fairly by all that is on it."""

    bytes_per_s: float  # each way
    latency_s: float
    bytes_of: Callable[[Stage], float]  # of a START: the whole tensor that a rank sends, or has after a gather
    scattered: Collection[str] = ()  # buckets whose gradients are reduce-scattered, not all-reduced

    def link_bytes(self, stage: Stage, ranks: int) -> float:
        """What a collective puts on each link, each way."""
        reduces = stage.op is Op.SUM or (stage.op is Op.GRADS and stage.buckets[0] not in self.scattered)
        return (2 if reduces else 1) * (ranks - 1) / ranks * self.bytes_of(stage)

    def alone_s(self, stage: Stage, ranks: int) -> float:
        """How long it takes with nothing else on the wire."""
        return 0.0 if ranks == 1 else self.latency_s + self.link_bytes(stage, ranks) / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened.  `ledger`: of each group, what each of its ranks started, in order."""

    step_s: float
    ledger: Mapping[Group, Mapping[int, Sequence[str]]]
    recorders: Sequence[Recorder]

    def events(self, rank: int) -> list[Event]:
        """In virtual seconds from the start of the step."""
        return self.recorders[rank].events()


@dataclass(slots=True, eq=False)
class Sent:
    """A START of one rank."""

    stage: Stage
    ranks: tuple[int, ...]
    asked_s: float
    needs: list["Sent"]  # split sizes that are still on their way
    ready: bool = False  # the device has it
    started_s: float | None = None
    done: bool = False

    @property
    def can_leave(self) -> bool:
        return self.ready and all(n.done for n in self.needs)


@dataclass(slots=True, eq=False)
class Here:
    """What a rank sees of its own lanes: all that a rule may look at."""

    under_way: dict[str, list[Sent]] = field(default_factory=dict)  # lane -> started, not done
    queued: dict[str, deque[Sent]] = field(default_factory=dict)  # lane -> not started

    def sent(self, ops: Collection[Op]) -> Sent | None:
        """Something of these on the wire, or started and waiting for other ranks."""
        return next((s for lane in self.under_way.values() for s in lane if s.stage.op in ops), None)

    def asked(self, ops: Collection[Op]) -> Sent | None:
        """Something of these that the device has, at the head of its lane."""
        return next((lane[0] for lane in self.queued.values() if lane and lane[0].stage.op in ops and lane[0].ready), None)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a rank decides what starts when, by what it sees."""

    lane: Callable[[Stage], str]  # what is in one lane starts in the program's order
    held: Callable[[Stage, Here], Sent | None]  # what holds back the head of a lane, which could leave


def _held(stage: Stage, here: Here) -> Sent | None:
    if stage.credit and len(lane := here.under_way.get(stage.axis, [])) >= stage.credit:
        return lane[0]
    return here.sent(stage.yields_to) or here.asked(stage.yields_to) if stage.yields_to else None


def _held_literally(stage: Stage, here: Here) -> Sent | None:
    if stage.op in MOVABLE:
        return here.sent((*MOVABLE, Op.TOKENS)) or here.asked((Op.TOKENS,))
    return here.sent(MOVABLE) if stage.op is Op.TOKENS else None


# Only what a stage itself names holds it back: tokens never wait for gradients.
OURS = Rule(lambda stage: stage.axis, _held)
# Lina's scheduler as the paper has it (sections 4.1 and 6.1): gradients in one queue, of which one leaves when no all-to-all is
# queued or running here; an all-to-all leaves when no gradient is running here.  Each waits for the other.
LITERAL = Rule(lambda stage: "gradients" if stage.op in MOVABLE else stage.axis, _held_literally)


def run(programs: Sequence[Program], *, ranks_of: RanksOf, seconds: Seconds, wire: Wire, rule: Rule = OURS) -> Timeline:
    """One step: rank r walks `programs[r]`, normally the same list on all.  Deadlock if it has no end."""
    return _Cluster(programs, ranks_of, seconds, wire, rule).run()


def lower_bound(programs: Sequence[Program], *, ranks_of: RanksOf, seconds: Seconds, wire: Wire) -> dict[str, float]:
    """What no order of these stages can beat: `bound_s`, the longest of `compute_s`, the busiest device; `link_s`, the bytes of
    the busiest link; `critical_path_s`, the longest chain of stages that need each other, with the wire for each alone."""
    compute_s = link_s = critical_path_s = 0.0
    for rank, program in enumerate(programs):
        ends_s: dict[str, float] = {}
        device_s = wire_s = 0.0
        for stage in program:
            took_s = 0.0
            if stage.kind is Kind.COMPUTE:
                took_s = seconds(rank, stage)
                device_s += took_s
            elif stage.kind is Kind.START:
                size = len(ranks_of(stage.axis, rank))
                took_s = wire.alone_s(stage, size)
                wire_s += wire.link_bytes(stage, size) / wire.bytes_per_s
            end_s = max((ends_s.get(v, 0.0) for v in reads_of(stage)), default=0.0) + took_s
            for value in writes_of(stage):
                ends_s[value] = max(end_s, ends_s.get(value, 0.0))
        compute_s, link_s = max(compute_s, device_s), max(link_s, wire_s)
        critical_path_s = max(critical_path_s, *ends_s.values())
    bound_s = max(compute_s, link_s, critical_path_s)
    return {"compute_s": compute_s, "link_s": link_s, "critical_path_s": critical_path_s, "bound_s": bound_s}


@dataclass(slots=True, eq=False)
class _Collective:
    sent: dict[int, Sent]  # by rank
    left: float = 0.0  # bytes on each link
    speed: float = 0.0
    since_s: float = 0.0  # `left` is of then
    version: int = 0  # of its end, which moves with its speed


@dataclass(slots=True, eq=False)
class _Rank:
    program: Program
    at: int = 0  # the stage where it stands
    clock_s: float = 0.0  # until when the device is busy
    blocked: bool = False
    here: Here = field(default_factory=Here)
    on_wire: dict[str, Sent] = field(default_factory=dict)  # by value
    link: dict[_Collective, None] = field(default_factory=dict)  # an ordered set
    recorder: Recorder = field(default_factory=Recorder)


class _Cluster:
    def __init__(self, programs: Sequence[Program], ranks_of: RanksOf, seconds: Seconds, wire: Wire, rule: Rule):
        self._ranks_of, self._seconds, self._wire, self._rule = ranks_of, seconds, wire, rule
        self._ranks = [_Rank(program) for program in programs]
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = 0
        self._collectives: dict[tuple[Group, int], _Collective] = {}
        self._ledger: dict[Group, dict[int, list[str]]] = {}

    def run(self) -> Timeline:
        for rank in range(len(self._ranks)):
            self._at(0.0, self._walk, rank)
        while self._events:
            self._now_s, _, happen, arguments = heapq.heappop(self._events)
            happen(*arguments)
        if any(r.at < len(r.program) for r in self._ranks):
            raise Deadlock("\n".join([f"no rank can go on at {self._now_s:.6g} s", *map(self._stands, range(len(self._ranks)))]))
        return Timeline(max(r.clock_s for r in self._ranks), self._ledger, [r.recorder for r in self._ranks])

    def _at(self, time_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        self._numbers += 1  # what is due at one time happens in the order of asking
        heapq.heappush(self._events, (time_s, self._numbers, happen, arguments))

    # the program
    def _walk(self, number: int) -> None:
        """Go on until the rank must wait.  Computing alone moves only its own clock."""
        rank = self._ranks[number]
        while rank.at < len(rank.program):
            stage = rank.program[rank.at]
            missing = [s for v in stage.reads if (s := rank.on_wire.get(v)) is not None and not s.done]
            if rank.clock_s > self._now_s and (stage.kind is not Kind.COMPUTE or missing):
                self._at(rank.clock_s, self._walk, number)
                return
            if stage.kind is Kind.START:
                self._ask(number, stage, missing)
            elif stage.op is Op.COUNTS:  # passed: whoever reads the sizes waits for them
                rank.on_wire[stage.writes[0]] = rank.on_wire[stage.reads[0]]
            elif missing:
                rank.blocked = True
                return
            else:
                self._pass(number, rank, stage)
            rank.at += 1

    def _pass(self, number: int, rank: _Rank, stage: Stage) -> None:
        came_s, free_s = rank.clock_s, max(rank.clock_s, self._now_s)
        rank.clock_s = free_s + self._seconds(number, stage)
        if stage.kind is Kind.COMPUTE:
            rank.recorder.add(COMPUTE, stage, 0, free_s, free_s, rank.clock_s, 0.0)
        else:
            rank.recorder.add(WAIT, stage, 0, came_s, came_s, rank.clock_s, free_s - came_s)

    def _ask(self, number: int, stage: Stage, needs: list[Sent]) -> None:
        """Into its lane.  With nobody to talk to there is no lane."""
        rank, ranks = self._ranks[number], self._ranks_of(stage.axis, number)
        sent = Sent(stage, ranks, self._now_s, needs)
        for value in stage.writes:
            rank.on_wire[value] = sent
        if len(ranks) == 1:
            sent.done = True
            return
        rank.here.queued.setdefault(self._rule.lane(stage), deque()).append(sent)
        self._at(self._now_s + self._seconds(number, stage), self._ready, number, sent)

    def _ready(self, number: int, sent: Sent) -> None:
        sent.ready = True
        self._look(number)

    # lanes
    def _look(self, number: int) -> None:
        """Start what heads its lane and isn't held back."""
        here = self._ranks[number].here
        for name, lane in here.queued.items():
            while lane and lane[0].can_leave and self._rule.held(lane[0].stage, here) is None:
                sent = lane.popleft()
                here.under_way.setdefault(name, []).append(sent)
                self._start(number, sent)

    def _start(self, number: int, sent: Sent) -> None:
        sent.started_s, axis = self._now_s, sent.stage.axis
        tags = self._ledger.setdefault((axis, sent.ranks), {r: [] for r in sent.ranks})[number]
        collective = self._collectives.setdefault(((axis, sent.ranks), len(tags)), _Collective({}))
        tags.append(sent.stage.tag)
        collective.sent[number] = sent
        if len(collective.sent) == len(sent.ranks):
            collective.left = max(self._wire.link_bytes(s.stage, len(s.ranks)) for s in collective.sent.values())
            self._share(collective, joins=True)

    # links
    def _share(self, changed: _Collective, *, joins: bool) -> None:
        """Something joins or leaves the links of its ranks: all that is on them changes speed.  A collective is as fast as on
        its fullest link."""
        links = [self._ranks[r].link for r in changed.sent]
        for link in links:
            if joins:
                link[changed] = None
            else:
                del link[changed]
        for other in dict.fromkeys(c for link in links for c in link):
            other.left = max(0.0, other.left - other.speed * (self._now_s - other.since_s))
            other.speed = self._wire.bytes_per_s / max(len(self._ranks[r].link) for r in other.sent)
            other.since_s = self._now_s
            other.version += 1
            self._at(self._now_s + other.left / other.speed, self._drained, other, other.version)

    def _drained(self, collective: _Collective, version: int) -> None:
        if version == collective.version:
            self._share(collective, joins=False)
            self._at(self._now_s + self._wire.latency_s, self._arrived, collective)

    def _arrived(self, collective: _Collective) -> None:
        for number, sent in collective.sent.items():
            sent.done = True
            self._ranks[number].here.under_way[self._rule.lane(sent.stage)].remove(sent)
            size, started_s = self._wire.bytes_of(sent.stage), sent.started_s
            assert started_s is not None
            self._ranks[number].recorder.add(SEND, sent.stage, int(size), sent.asked_s, started_s, self._now_s, 0.0)
        for number in collective.sent:
            self._look(number)
            if self._ranks[number].blocked:
                self._ranks[number].blocked = False
                self._walk(number)

    def _stands(self, number: int) -> str:
        """For people: where a rank is, and what holds up each of its lanes."""
        rank = self._ranks[number]
        out = [f"rank {number} " + (f"stands at {rank.program[rank.at].tag}" if rank.at < len(rank.program) else "is done")]
        for name, lane in rank.here.queued.items():
            under_way = rank.here.under_way.get(name, [])
            for collective in (c for c in self._collectives.values() if c.sent.get(number) in under_way):
                sent = collective.sent[number]
                absent = ", ".join(str(r) for r in sent.ranks if r not in collective.sent)
                out.append(f"lane {name}: {sent.stage.tag} has left, rank {absent} has not started it")
            if lane:
                by = self._rule.held(lane[0].stage, rank.here) or lane[0].needs[0]
                out.append(f"lane {name}: {lane[0].stage.tag} is held back by {by.stage.tag}")
        return "; ".join(out)
