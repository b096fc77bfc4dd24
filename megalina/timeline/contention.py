"""Contention: what a step had on the wire, how long its device stood still for it, and what slowed it down.

How long a transfer lasts on one rank is no measure of the wire: a rank that comes early waits for the others, and that is
in it.  The last rank to come waits for nobody, so the smallest slowdown over the ranks of a group is the transfer's own, and
no two clocks are compared.  All else is as this rank saw it: while it waits for another rank's tokens, it does wait.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event
from megalina.timeline.spans import Span, length_s, overlaps, shared_s, union

CLASSES = {"tokens": "a2a", "grads": "grads", "params": "params"}  # by what is sent; all else is OTHER
GATHERED = ("gather", "scatter")  # along ep: of tokens that go to all experts
MESSAGES = ("send", "recv")
OTHER = "other"  # split sizes; sums, gathers, scatters and exchanges of tensor and context parallelism
STAGES = "pp"  # messages between the stages of a pipeline
CALIBRATED_AXIS = {"tokens": "ep", "grads": "dp", "params": "dp"}  # the axis of the mesh that an `Alone` is of


@dataclass(frozen=True, slots=True)
class Alone:
    """How long an operation takes that has the links to itself: a line over its bytes."""

    latency_s: float
    s_per_byte: float

    def seconds(self, num_bytes: int) -> float:
        """`num_bytes` as in `Event`; 0 where nothing was calibrated."""
        return self.latency_s + self.s_per_byte * num_bytes


@dataclass(frozen=True, slots=True)
class Traffic:
    """One class of traffic in one step, on one rank."""

    num_bytes: int
    wire_s: float  # something of it was on the wire
    exposed_s: float  # the device stood still for it
    slowdowns: tuple[float, ...]  # sorted: duration over duration alone, of each transfer that is calibrated
    under: Mapping[str, float]  # share of wire_s in which the device computed ("compute"), or another class was on the wire


@dataclass(frozen=True, slots=True)
class AllToAll:
    """One exchange of tokens, as all ranks of its group saw it."""

    tag: str
    phase: str
    slowdown: float  # the smallest over the ranks
    beside: frozenset[str]  # "grads", "params", "tokens" (of another one): what shared the wire with it, on any of the ranks


@dataclass(frozen=True, slots=True)
class Contention:
    """One step, on one rank."""

    step_s: float
    compute_s: float
    traffic: Mapping[str, Traffic]  # a2a, grads, params, other; with pipelines pp

    @property
    def idle_share(self) -> float:
        """The share of the step in which the device did not compute."""
        return 1.0 - self.compute_s / self.step_s if self.step_s else 0.0

    def as_metrics(self) -> dict[str, float | None]:
        """Flat, for metrics.jsonl; None: nothing of the kind was on the wire, or it was not calibrated."""
        out: dict[str, float | None] = {"idle_share": self.idle_share}
        for name, traffic in self.traffic.items():
            out |= {f"{name}_exposed_s": traffic.exposed_s, f"{name}_wire_s": traffic.wire_s, f"{name}_bytes": traffic.num_bytes}
        for name in CLASSES.values():
            traffic = self.traffic[name]
            out[f"{name}_slowdown"] = quantile(traffic.slowdowns, 0.5)
            out |= {f"{name}_under_{other}": traffic.under.get(other) for other in ("compute", *self.traffic) if other != name}
        a2a = self.traffic["a2a"]
        return out | {"a2a_slowdown_p95": quantile(a2a.slowdowns, 0.95), "a2a_slowdown_max": quantile(a2a.slowdowns, 1.0)}


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of them don't exceed (0.5: the median); None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return statistics.median(ordered) if share == 0.5 else ordered[max(0, ceil(share * len(ordered)) - 1)]


def class_of(event: Event) -> str:
    """a2a, grads, params, pp or other, of what is sent or awaited."""
    if event.op in MESSAGES:
        return STAGES
    return CLASSES["tokens"] if event.op in GATHERED and event.axis == "ep" else CLASSES.get(event.op, OTHER)


def own_slowdowns(events: Iterable[Event], alone: Mapping[str, Alone]) -> dict[str, float]:
    """{tag: duration over duration alone}, as this rank saw them: its waiting for others is in it."""
    out: dict[str, float] = {}
    for e in events:
        if e.kind == SEND and e.num_bytes and e.op in alone and e.axis == CALIBRATED_AXIS.get(e.op):
            if (alone_s := alone[e.op].seconds(e.num_bytes)) > 0:
                out[e.tag] = (e.end_s - e.start_s) / alone_s
    return out


def group_slowdowns(by_rank: Iterable[Iterable[Event]], alone: Mapping[str, Alone]) -> dict[str, float]:
    """{tag: slowdown}, the smallest over the ranks of one group, whose events `by_rank` has."""
    out: dict[str, float] = {}
    for events in by_rank:
        for tag, slowdown in own_slowdowns(events, alone).items():
            out[tag] = min(slowdown, out.get(tag, slowdown))
    return out


def summary(events: Sequence[Event], alone: Mapping[str, Alone], of_group: Mapping[str, float] | None = None) -> Contention:
    """A rank's step.  `alone`: by op ("tokens", "grads", "params").  `of_group`: slowdowns as the groups agree on them, by
    tag; where one is missing this rank's own is taken."""
    slowdown = {**own_slowdowns(events, alone), **(of_group or {})}
    compute = union((e.start_s, e.end_s) for e in events if e.kind == COMPUTE)
    names = (*CLASSES.values(), OTHER, *([STAGES] if any(e.op in MESSAGES for e in events) else ()))
    sends = {name: [e for e in events if e.kind == SEND and class_of(e) == name] for name in names}
    wires = {name: union((e.start_s, e.end_s) for e in sends[name]) for name in names}
    traffic = {}
    for name in names:
        wire_s = length_s(wires[name])
        others = {"compute": compute} | {other: wires[other] for other in names if other != name}
        traffic[name] = Traffic(
            num_bytes=sum(e.num_bytes for e in sends[name]),
            wire_s=wire_s,
            exposed_s=sum(e.exposed_s for e in events if e.kind == WAIT and class_of(e) == name),
            slowdowns=tuple(sorted(slowdown[e.tag] for e in sends[name] if e.tag in slowdown)),
            under={other: shared_s(wires[name], spans) / wire_s for other, spans in others.items()} if wire_s else {},
        )
    start_s, end_s = span_of(events)
    return Contention(end_s - start_s, length_s(compute), traffic)


def span_of(events: Sequence[Event]) -> Span:
    """From a rank's first computation or wait of a step to its last."""
    own = [e for e in events if e.kind != SEND]
    return min(e.start_s for e in own), max(e.end_s for e in own)


def slowdowns(
    by_rank: Sequence[Sequence[Event]], alone: Mapping[str, Alone], under: str | None = None, phase: str | None = None
) -> list[float]:
    """Of `all_to_alls`, sorted: those that shared the wire with a piece of `under` ("grads"), those of `phase` ("B")."""
    found = all_to_alls(by_rank, alone)
    return sorted(t.slowdown for t in found if (under is None or under in t.beside) and phase in (None, t.phase))


def all_to_alls(by_rank: Sequence[Sequence[Event]], alone: Mapping[str, Alone]) -> list[AllToAll]:
    """Every exchange of tokens of one step that was calibrated, by its tag.

    `by_rank`: the events of the ranks of *one* group of the ep axis; another group's exchange of the same instruction is another.
    """
    phases: dict[str, str] = {}
    beside: dict[str, set[str]] = {}
    smallest = group_slowdowns([[e for e in events if e.op == "tokens"] for events in by_rank], alone)
    for events in by_rank:
        wires = {op: union((e.start_s, e.end_s) for e in events if e.kind == SEND and e.op == op) for op in ("grads", "params")}
        sent = [e for e in events if e.kind == SEND and e.op == "tokens"]
        for e in sent:
            phases[e.tag] = e.phase
            shared = {op for op, wire in wires.items() if shared_s([(e.start_s, e.end_s)], wire)}
            beside.setdefault(e.tag, set()).update(shared)
        for first, second, _ in overlaps([(e.start_s, e.end_s) for e in sent]):
            beside[sent[first].tag].add("tokens")
            beside[sent[second].tag].add("tokens")
    return [AllToAll(tag, phases[tag], slowdown, frozenset(beside[tag])) for tag, slowdown in smallest.items()]
