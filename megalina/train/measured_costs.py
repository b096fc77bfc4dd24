"""Measured costs: what instructions of a run take and send, from the events of its own steps, for lists that it has not walked.

Plans whose parts differ in size tell what a part costs whatever its size; between two sizes costs are a straight line.  Latency
and rate of the wire are taken from what had it to itself: where `fitted_network` begins.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from megalina.perfmodel.sim.fitted_network import Seen
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import MOVABLE, Instruction, Kind, Op, Program
from megalina.timeline.contention import class_of
from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event

Kept = tuple[str, bool]  # `Instruction.timed_as`, and whether it leaves weights' gradients out
Points = tuple[tuple[float, float], ...]  # share of a micro-batch, value
WEIGHTS_SHARE = 0.5  # of backward, where the weights' gradients of an instruction were never measured apart
FEWEST_ALONE = 3  # sends of a size with the wire to themselves; of fewer nothing is concluded


@dataclass(frozen=True, slots=True)
class Sample:
    """What one rank saw in some steps of one plan."""

    seconds: Mapping[tuple[Kept, float], float]  # by kind and share
    num_bytes: Mapping[tuple[Kept, float], float]  # of what STARTs send, the whole tensor
    latency_s: float
    s_per_byte: float  # of a rank's link
    step_s: float
    tokens_s: float = 0.0  # of the step, that the device stood still for them
    gradients_s: float = 0.0


def sample_of(steps: Sequence[Sequence[Event]], program: Program, size_of: Callable[[str], int]) -> Sample:
    """`steps`: the events of each; `size_of`: ranks along an axis, or nodes where rows go once to each."""
    by_tag = {s.tag: s for s in program}
    seconds: dict[tuple[Kept, float], list[float]] = defaultdict(list)
    sent: dict[tuple[Kept, float], list[float]] = defaultdict(list)
    alone: dict[float, list[float]] = defaultdict(list)
    others: dict[float, list[float]] = defaultdict(list)
    for events in steps:
        sends = sorted((e for e in events if e.kind == SEND), key=lambda e: e.start_s)
        for n, e in enumerate(sends):
            ranks = size_of(e.axis)
            if ranks > 1 and (s := by_tag.get(e.tag)) is not None:
                whole = _whole(s, e.num_bytes, ranks)
                sent[_kind(s), _share(s)].append(whole)
                near = (*sends[max(0, n - 4) : n], *sends[n + 1 : n + 5])
                met = any(o.start_s < e.end_s and e.start_s < o.end_s for o in near)
                (others if met else alone)[_on_link(s, whole, ranks)].append(e.end_s - e.start_s)
        for e in events:
            if e.kind == COMPUTE and (s := by_tag.get(e.tag)) is not None:
                seconds[_kind(s), _share(s)].append(e.end_s - e.start_s)
    step_s = statistics.median(max(e.end_s for e in events) - min(e.start_s for e in events) for events in steps)
    latency_s, s_per_byte = _wire(alone, others)
    waits_s = {name: statistics.median(map(partial(_waited_s, name), steps)) for name in ("a2a", "grads", "params")}
    gradients_s = waits_s["grads"] + waits_s["params"]
    return Sample(_medians(seconds), _medians(sent), latency_s, s_per_byte, step_s, waits_s["a2a"], gradients_s)


def _waited_s(name: str, events: Sequence[Event]) -> float:
    return sum(e.exposed_s for e in events if e.kind == WAIT and class_of(e) == name)


def _kind(instruction: Instruction) -> Kept:
    return instruction.timed_as, instruction.late and instruction.phase == "B"


def _share(instruction: Instruction) -> float:
    return instruction.share / instruction.chunk[1]


def _whole(instruction: Instruction, num_bytes: float, ranks: int) -> float:
    """The tensor of which a rank counts `num_bytes` (`megalina.perfmodel.sim.sizes.own_bytes`)."""
    if instruction.op in (Op.TOKENS, Op.COUNTS, Op.EVEN):
        return num_bytes * ranks / (ranks - 1)
    return num_bytes * ranks if instruction.op in (Op.GATHER, Op.PARAMS) else num_bytes


def _on_link(instruction: Instruction, whole: float, ranks: int) -> float:
    """What leaves a rank where everybody sends to everybody."""
    rounds = 2 if instruction.op in (Op.SUM, Op.MAX, Op.GRADS) else 1
    return rounds * whole * (ranks - 1) / ranks


def _medians(found: Mapping[tuple[Kept, float], Sequence[float]]) -> dict[tuple[Kept, float], float]:
    return {key: statistics.median(values) for key, values in found.items()}


def _low(values: Sequence[float]) -> float:
    """The lower quartile: what waits for a rank that is late takes longer than the wire."""
    return sorted(values)[len(values) // 4]


def _wire(alone: Mapping[float, Sequence[float]], others: Mapping[float, Sequence[float]]) -> tuple[float, float]:
    """Latency, that of the smallest sends, and seconds a byte, those of the largest; 0 of what can't be told.  Each: seconds by
    bytes, of what had the wire to itself, and of what shared it."""
    if not alone and not others:
        return 0.0, 0.0
    small = min([*alone, *others])
    of_small = _low([*alone.get(small, ()), *others.get(small, ())])
    told = {size: times for size, times in alone.items() if len(times) >= FEWEST_ALONE and size > small}
    told = told or {size: times for size, times in others.items() if size > small}
    large = max(told, default=0.0)
    return of_small, max(0.0, _low(told[large]) - of_small) / (large - small) if large else 0.0


@dataclass(slots=True)
class MeasuredCosts:
    """Of the slowest rank; the wire's, of the median.  `gradient_bytes`, `weight_bytes`: of an element."""

    gradient_bytes: int
    weight_bytes: int
    latency_s: float = 0.0
    s_per_byte: float = 0.0
    seen: list[Seen] = field(default_factory=list)  # what was measured
    _wires: list[tuple[float, float]] = field(default_factory=list)  # latency, seconds a byte: of each rank and plan
    _seconds: dict[Kept, Points] = field(default_factory=dict)
    _bytes: dict[Kept, Points] = field(default_factory=dict)

    def add(self, of_ranks: Sequence[Sample], program: Program) -> None:
        """What all ranks saw of one more plan, of the list `program`: the slowest rank's step; waits are a mean over ranks."""
        waits_s = [statistics.fmean(getattr(s, name) for s in of_ranks) for name in ("tokens_s", "gradients_s")]
        self.seen.append(Seen(program, max(s.step_s for s in of_ranks), *waits_s))
        self._wires += [(s.latency_s, s.s_per_byte) for s in of_ranks]
        self.latency_s, self.s_per_byte = (
            statistics.median_high([value for value in values if value] or [0.0]) for values in zip(*self._wires, strict=True)
        )
        for known, name in ((self._seconds, "seconds"), (self._bytes, "num_bytes")):
            found = [getattr(sample, name) for sample in of_ranks]
            for kind, share in {key: None for of_rank in found for key in of_rank}:
                most = max(of_rank.get((kind, share), 0.0) for of_rank in found)
                points = dict(known.get(kind, ())) | {share: most}
                known[kind] = tuple(sorted(points.items()))

    def seconds(self, instruction: Instruction) -> float:
        """Of an instruction that computes; 0 of others, and of what was never seen."""
        if instruction.kind is not Kind.COMPUTE:
            return 0.0
        (name, late), share = _kind(instruction), _share(instruction)
        if (points := self._seconds.get((name, late))) is not None:
            return _at(points, share)
        weights = self._seconds.get((f"W{name[1:]}", False))
        other = self._seconds.get((name, not late))
        if instruction.phase == "W":
            whole = self._seconds.get((f"B{name[1:]}", False))
            return WEIGHTS_SHARE * _at(whole, share) if whole else 0.0
        if instruction.phase != "B" or other is None:
            return 0.0
        if late:
            return (
                _at(other, share) * (1 - WEIGHTS_SHARE) if weights is None else max(0.0, _at(other, share) - _at(weights, share))
            )
        return _at(other, share) + (_at(weights, share) if weights else 0.0)

    @property
    def sizes(self) -> Callable[[Instruction], float]:
        """Of a START: bytes of the whole tensor."""

        def of(instruction: Instruction) -> float:
            if instruction.op in MOVABLE:
                element = self.gradient_bytes if instruction.op is Op.GRADS else self.weight_bytes
                return float((instruction.piece[1] - instruction.piece[0]) * element)
            points = self._bytes.get(_kind(instruction))
            return _at(points, _share(instruction)) if points else 0.0

        return of

    def sizes_of(self, scattered: Sequence[str], *, by_node: bool = False, tokens_by_node: bool = False) -> Sizes:
        """`scattered`: buckets that ZeRO-1 shards; `by_node`, `tokens_by_node`: as of `Sizes`."""
        return Sizes(self.sizes, scattered, by_node=by_node, tokens_by_node=tokens_by_node)


def _at(points: Points, share: float) -> float:
    """On the straight line through the first and the last point, never below 0; through one point and 0 where there is but
    one."""
    (first, low), (last, high) = points[0], points[-1]
    if first == last:
        return low * share / first
    slope = (high - low) / (last - first)
    return max(0.0, low + slope * (share - first))
