"""The virtual cluster: ranks that walk their programs in virtual time, with the lanes and links of the real one.

Each rank has one device, which computes in the program's order, and one lane per axis of the mesh, in which what it starts
leaves in order (`megalina/comm/links.py`).  The n-th collective of a group begins when every rank has started its n-th
there, and its flows move over the links of a network (`network.py`), which all that is on them shares.

A host that is far ahead of its device changes no time, and then it can be left out: what is sent leaves when the device is there.
A host that is not has a clock of its own (`host`), as that of an emulated device has, where sockets and small math take time.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalina.perfmodel.sim.collectives import Collective, Floats
from megalina.perfmodel.sim.folding import FoldedLoads, Use
from megalina.perfmodel.sim.lanes import OURS, Here, Rule, Sent, circle_of
from megalina.perfmodel.sim.network import Load, Loads, Network
from megalina.perfmodel.sim.sizes import Sizes, own_bytes
from megalina.perfmodel.sim.traffic import Moving, Traffic
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event, Recorder

Group = tuple[str, tuple[int, ...]]  # axis, ranks
RanksOf = Callable[[str, int], tuple[int, ...]]  # the ranks of an axis that a rank talks to, itself among them
Seconds = Callable[
    [int, Instruction], float
]  # of a rank: COMPUTE: takes; START: until it can leave; WAIT: takes after the arrival


class Deadlock(RuntimeError):
    """No rank can go on; the message says who waits for whom in a circle, where each stands, what each of its lanes waits for."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened on the ranks that walked.  `ledger`: of each group, what each of them started, in order."""

    step_s: float
    ledger: Mapping[Group, Mapping[int, Sequence[str]]]
    recorders: Sequence[Recorder]

    def events(self, rank: int) -> list[Event]:
        """In virtual seconds from the start of the step."""
        return self.recorders[rank].events()


def simulate(
    programs: Sequence[Program],
    *,
    ranks_of: RanksOf,
    seconds: Seconds,
    network: Network,
    sizes: Sizes,
    rule: Rule = OURS,
    host: Seconds | None = None,
    loads: Loads | None = None,
) -> Timeline:
    """One step: rank r walks `programs[r]`, normally the same list on all.  Deadlock if it has no end.

    `loads`: None: of as many ranks as there are programs; `stages.py` has those of more ranks, of which some walk for others.

    `host`: what the thread that walks the list needs for each instruction.  It then asks for instructions one after another and
    stands at
    WAITs alone; a device begins an instruction when it is free and has been asked, and ends it no earlier than the host has
    asked."""
    loads = Loads(network, len(programs)) if loads is None else loads
    return _Cluster(programs, ranks_of, seconds, loads, sizes, rule, host).run()


def simulate_alike(
    program: Program,
    *,
    ranks: int,
    ranks_of: RanksOf,
    seconds: Callable[[Instruction], float],
    network: Network,
    sizes: Sizes,
    rule: Rule = OURS,
    slowest: bool = False,
    host: Callable[[Instruction], float] | None = None,
    loads: FoldedLoads | None = None,
) -> Timeline:
    """As `simulate` for ranks that all walk the same list at the same pace: rank 0 walks for all, and links that carry the same
    are one (`folding.py`), so more ranks take no longer.  ValueError where ranks aren't alike: sizes that differ between them, or
    groups of an axis that share links with other things than its other groups do (the one ring that leaves a node by its last
    rank).  With `slowest` such groups wait for the slowest of them, which is a little pessimistic.

    `loads`: what a walk with the same network, groups and uses (`uses_of`) has folded already."""
    if sizes.matrix_of is not None:
        raise ValueError("matrix_of says that ranks send different sizes: simulate every rank, or leave it out")
    loads = loads or FoldedLoads(network, ranks, ranks_of, uses_of(program, sizes), slowest=slowest)
    of_host = None if host is None else lambda _, instruction: host(instruction)
    return _Cluster([program], ranks_of, lambda _, instruction: seconds(instruction), loads, sizes, rule, of_host).run()


def uses_of(program: Program, sizes: Sizes) -> tuple[Use, ...]:
    """All that a program sends along each axis."""
    return tuple(dict.fromkeys((s.axis, sizes.collective(s)) for s in program if s.kind is Kind.START))


@dataclass(slots=True, eq=False)
class _Group:
    axis: str
    ranks: tuple[int, ...]
    walking: tuple[int, ...]  # those of its ranks that walk; the others do the same
    tags: dict[int, list[str]] = field(default_factory=dict)  # by rank
    collectives: list["_Collective"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Collective:
    group: _Group
    sent: dict[int, Sent] = field(default_factory=dict)  # by rank
    what: Collective = Collective.ALL_REDUCE
    num_bytes: float = 0.0
    bytes_NN: Floats | None = None
    urgency: int = 0
    phases: deque[Load] = field(default_factory=deque)  # that are to come


@dataclass(slots=True, eq=False)
class _Rank:
    program: Program
    at: int = 0  # the instruction where it stands
    clock_s: float = 0.0  # until when the device is busy
    host_s: float = 0.0  # until when the host is, if it has a clock
    blocked: bool = False
    here: Here = field(default_factory=Here)
    on_wire: dict[str, Sent] = field(default_factory=dict)  # by value
    recorder: Recorder = field(default_factory=Recorder)


_Waiting = tuple[int, Sent | None]  # a rank's program, or something that it has asked for


class _Cluster:
    def __init__(
        self,
        programs: Sequence[Program],
        ranks_of: RanksOf,
        seconds: Seconds,
        loads: Loads,
        sizes: Sizes,
        rule: Rule,
        host: Seconds | None,
    ):
        self._ranks_of, self._seconds, self._loads, self._sizes, self._rule = ranks_of, seconds, loads, sizes, rule
        self._host = host
        self._ranks = [_Rank(program) for program in programs]
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = 0
        self._groups: dict[Group, _Group] = {}
        self._group_of: dict[tuple[str, int], _Group] = {}
        self._traffic = Traffic(loads.capacity_L)
        self._moving: dict[Moving, _Collective] = {}
        self._shares = 0  # how often the links were shared anew, which moves what ends next
        self._will_share = False

    def run(self) -> Timeline:
        for rank in range(len(self._ranks)):
            self._at(0.0, self._walk, rank)
        while self._events:
            self._now_s, _, happen, arguments = heapq.heappop(self._events)
            happen(*arguments)
        if any(r.at < len(r.program) for r in self._ranks):
            stands = map(self._stands, range(len(self._ranks)))
            raise Deadlock("\n".join([f"no rank can go on at {self._now_s:.6g} s", *self._circle(), *stands]))
        ledger = {key: group.tags for key, group in self._groups.items() if any(group.tags.values())}
        return Timeline(max(max(r.clock_s, r.host_s) for r in self._ranks), ledger, [r.recorder for r in self._ranks])

    def _at(self, time_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        self._numbers += 1  # what is due at one time happens in the order of asking
        heapq.heappush(self._events, (time_s, self._numbers, happen, arguments))

    # the program
    def _walk(self, number: int) -> None:
        """Go on until the rank must wait.  Computing alone moves only its own clock."""
        rank = self._ranks[number]
        while rank.at < len(rank.program):
            instruction = rank.program[rank.at]
            missing = [s for v in instruction.reads if (s := rank.on_wire.get(v)) is not None and not s.done]
            due_s = rank.clock_s if self._host is None else rank.host_s
            if due_s > self._now_s and (instruction.kind is not Kind.COMPUTE or missing):
                self._at(due_s, self._walk, number)
                return
            if instruction.kind is Kind.START:
                self._ask(number, instruction, missing)
            elif instruction.op is Op.COUNTS:  # passed: the reader of the sizes waits for them
                rank.on_wire[instruction.writes[0]] = rank.on_wire[instruction.reads[0]]
            elif missing:
                rank.blocked = True
                return
            else:
                self._pass(number, rank, instruction)
            rank.at += 1

    def _pass(self, number: int, rank: _Rank, instruction: Instruction) -> None:
        if self._host is not None:
            self._pass_with_host(rank, instruction, self._seconds(number, instruction), self._host(number, instruction))
            return
        came_s, free_s = rank.clock_s, max(rank.clock_s, self._now_s)
        rank.clock_s = free_s + self._seconds(number, instruction)
        if instruction.kind is Kind.COMPUTE:
            rank.recorder.add(COMPUTE, instruction, 0, free_s, free_s, rank.clock_s, 0.0)
        else:
            rank.recorder.add(WAIT, instruction, 0, came_s, came_s, rank.clock_s, free_s - came_s)

    def _pass_with_host(self, rank: _Rank, instruction: Instruction, device_s: float, host_s: float) -> None:
        came_s, here_s = rank.host_s, max(rank.host_s, self._now_s)
        rank.host_s = here_s + host_s
        if instruction.kind is Kind.COMPUTE:
            start_s = max(rank.clock_s, here_s)
            rank.clock_s = max(start_s + device_s, rank.host_s)
            rank.recorder.add(COMPUTE, instruction, 0, here_s, start_s, rank.clock_s, 0.0)
        else:
            exposed_s = max(0.0, rank.host_s - max(came_s, rank.clock_s))
            rank.recorder.add(WAIT, instruction, 0, came_s, came_s, rank.host_s, exposed_s)

    def _ask(self, number: int, instruction: Instruction, needs: list[Sent]) -> None:
        """Into its lane.  With nobody to talk to there is no lane."""
        rank = self._ranks[number]
        sent = Sent(instruction, self._now_s, needs)
        for value in instruction.writes:
            rank.on_wire[value] = sent
        if len(self._group(instruction.axis, number).ranks) == 1:
            sent.done = True
            return
        rank.here.queued.setdefault(self._rule.lane(instruction), deque()).append(sent)
        if self._host is None:
            self._at(self._now_s + self._seconds(number, instruction), self._ready, number, sent)
        else:  # it leaves when the device is there
            rank.host_s = self._now_s + self._host(number, instruction)
            self._at(max(rank.host_s, rank.clock_s), self._ready, number, sent)

    def _group(self, axis: str, number: int) -> _Group:
        if (axis, number) not in self._group_of:
            ranks = self._ranks_of(axis, number)
            walking = tuple(r for r in ranks if r < len(self._ranks))
            group = self._groups.setdefault((axis, ranks), _Group(axis, ranks, walking, {r: [] for r in walking}))
            self._group_of[axis, number] = group
        return self._group_of[axis, number]

    def _ready(self, number: int, sent: Sent) -> None:
        sent.ready = True
        self._look(number)

    # lanes
    def _look(self, number: int) -> None:
        """Start what heads its lane and isn't held back."""
        here = self._ranks[number].here
        for name, lane in here.queued.items():
            while lane and lane[0].can_leave and self._held(lane[0], name, here) is None:
                sent = lane.popleft()
                here.under_way.setdefault(name, []).append(sent)
                self._start(number, sent)

    def _held(self, head: Sent, lane: str, here: Here) -> Sent | None:
        """What holds back the head of a lane, by the rule or because the library has its hands full."""
        under_way, most = here.under_way.get(lane, []), self._loads.network.at_once
        return under_way[0] if 0 < most <= len(under_way) else self._rule.held(head.instruction, here)

    def _start(self, number: int, sent: Sent) -> None:
        sent.started_s, group = self._now_s, self._group(sent.instruction.axis, number)
        tags = group.tags[number]
        if len(tags) == len(group.collectives):
            group.collectives.append(_Collective(group))
        collective = group.collectives[len(tags)]
        tags.append(sent.instruction.tag)
        collective.sent[number] = sent
        if len(collective.sent) == len(group.walking):
            self._begin(collective)

    # links
    def _begin(self, collective: _Collective) -> None:
        group, sizes = collective.group, self._sizes
        instructions = [s.instruction for s in collective.sent.values()]
        instruction = (
            instructions[0] if len(instructions) == 1 else max(instructions, key=sizes.bytes_of)
        )  # ranks may have mixed them up
        assert instruction.traffic is not None
        collective.what, collective.num_bytes, collective.bytes_NN = sizes.sent(instruction, group.ranks)
        collective.urgency = self._loads.network.urgency(instruction.traffic)
        ranks = group.ranks
        if collective.what is Collective.SEND:  # from whom to whom
            ranks = tuple(sorted(ranks, key=lambda rank: collective.sent[rank].instruction.op is not Op.SEND))
        collective.phases.extend(self._loads.of(group.axis, collective.what, ranks, collective.bytes_NN))
        self._move(collective)

    def _move(self, collective: _Collective) -> None:
        """Its next phase joins what is on the links."""
        moving = self._traffic.add(collective.phases[0], collective.num_bytes, collective.urgency, self._now_s)
        self._moving[moving] = collective
        if not self._will_share:
            self._will_share = True
            self._at(self._now_s, self._share)

    def _share(self) -> None:
        """Once all that joins or ends now has done so."""
        self._will_share = False
        self._shares += 1
        next_s = self._traffic.settle(self._now_s)
        if next_s < math.inf:
            self._at(next_s, self._ended, self._shares)

    def _ended(self, shares: int) -> None:
        if shares == self._shares:
            for moving in self._traffic.ended(self._now_s):
                collective = self._moving.pop(moving)
                latency_s = collective.phases.popleft().latency_s
                self._at(self._now_s + latency_s, self._move if collective.phases else self._arrived, collective)
            self._share()

    def _arrived(self, collective: _Collective) -> None:
        ranks, bytes_NN, what = collective.group.ranks, collective.bytes_NN, collective.what
        per_node = self._loads.network.ranks_per_node
        places = len(ranks) if what is not Collective.ALL_TO_ALL_BY_NODE else len({rank // per_node for rank in ranks})
        for number, sent in collective.sent.items():
            sent.done = True
            self._ranks[number].here.under_way[self._rule.lane(sent.instruction)].remove(sent)
            assert sent.started_s is not None
            place = ranks.index(number) if bytes_NN is not None else 0
            size = round(own_bytes(what, collective.num_bytes, places, place, bytes_NN))
            self._ranks[number].recorder.add(SEND, sent.instruction, size, sent.asked_s, sent.started_s, self._now_s, 0.0)
        for number in collective.sent:
            self._look(number)
            if self._ranks[number].blocked:
                self._ranks[number].blocked = False
                self._walk(number)

    def _circle(self) -> list[str]:
        """For people: ranks that wait for one another; nothing where all wait for a rank that is done."""
        begin: list[_Waiting] = [(number, None) for number in range(len(self._ranks))]
        return [f"in a circle: {why}" if i == 0 else f"  {why}" for i, why in enumerate(circle_of(begin, self._waits_for))]

    def _waits_for(self, waiting: _Waiting) -> list[tuple[_Waiting, str]]:
        number, sent = waiting
        rank = self._ranks[number]
        if sent is None:
            if rank.at == len(rank.program):
                return []
            instruction = rank.program[rank.at]
            missing = [s for v in instruction.reads if (s := rank.on_wire.get(v)) is not None and not s.done]
            return [((number, s), f"rank {number} stands at {instruction.tag}, for {s.instruction.tag}") for s in missing]
        tag = sent.instruction.tag
        if sent.started_s is not None:
            group = self._group(sent.instruction.axis, number)
            collective = next(c for c in group.collectives if c.sent.get(number) is sent)
            absent = [r for r in group.walking if r not in collective.sent]
            return [((r, self._asked(r, group)), f"rank {number} has started {tag} and waits for rank {r} to") for r in absent]
        head = rank.here.queued[self._rule.lane(sent.instruction)][0]
        if sent is not head:
            return [((number, head), f"rank {number} starts {tag} after {head.instruction.tag}")]
        if needs := [n for n in sent.needs if not n.done]:
            return [((number, n), f"rank {number} starts {tag} after {n.instruction.tag}") for n in needs]
        by = self._held(sent, self._rule.lane(sent.instruction), rank.here)
        assert by is not None
        return [((number, by), f"rank {number} holds {tag} back for {by.instruction.tag}")]

    def _asked(self, number: int, group: _Group) -> Sent | None:
        """What a rank will start next in the group; None: its program has not asked for it."""
        queued = (s for lane in self._ranks[number].here.queued.values() for s in lane)
        return next((s for s in queued if self._group(s.instruction.axis, number) is group), None)

    def _stands(self, number: int) -> str:
        """For people: where a rank is, and what holds up each of its lanes."""
        rank = self._ranks[number]
        out = [f"rank {number} " + (f"stands at {rank.program[rank.at].tag}" if rank.at < len(rank.program) else "is done")]
        for name, lane in rank.here.queued.items():
            under_way = rank.here.under_way.get(name, [])
            for collective in (c for g in self._groups.values() for c in g.collectives if c.sent.get(number) in under_way):
                sent = collective.sent[number]
                absent = ", ".join(str(r) for r in collective.group.walking if r not in collective.sent)
                out.append(f"lane {name}: {sent.instruction.tag} has left, rank {absent} has not started it")
            if lane:
                by = self._held(lane[0], name, rank.here) or lane[0].needs[0]
                out.append(f"lane {name}: {lane[0].instruction.tag} is held back by {by.instruction.tag}")
        return "; ".join(out)
