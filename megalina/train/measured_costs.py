"""Measured costs: what instructions of a run take and send, from the events of its own steps, for lists that it has not walked.

Plans whose parts differ in size tell what a part costs whatever its size; between two sizes costs are a straight line.  The wire
is one figure of all ranks, latency and rate, taken from what had it to itself.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import MOVABLE, Instruction, Kind, Op, Program
from megalina.timeline.recorder import COMPUTE, SEND, Event

Kept = tuple[str, bool]  # `Instruction.timed_as`, and whether it leaves weights' gradients out
Points = tuple[tuple[float, float], ...]  # share of a micro-batch, value
WEIGHTS_SHARE = 0.5  # of backward, where the weights' gradients of an instruction were never measured apart
FEWEST_ALONE = 3  # sends with the wire to themselves; with fewer all are taken


@dataclass(frozen=True, slots=True)
class Sample:
    """What one rank saw in some steps of one plan."""

    seconds: Mapping[tuple[Kept, float], float]  # by kind and share
    num_bytes: Mapping[tuple[Kept, float], float]  # of what STARTs send, the whole tensor
    latency_s: float
    s_per_byte: float  # of a rank's link
    step_s: float


def sample_of(steps: Sequence[Sequence[Event]], program: Program, size_of: Callable[[str], int]) -> Sample:
    """`steps`: the events of each; `size_of`: ranks along an axis."""
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
    few = sum(map(len, alone.values())) < FEWEST_ALONE
    latency_s, s_per_byte = _line({size: _low(times) for size, times in (others if few else alone).items()})
    return Sample(_medians(seconds), _medians(sent), latency_s, s_per_byte, step_s)


def _kind(instruction: Instruction) -> Kept:
    return instruction.timed_as, instruction.late and instruction.phase == "B"


def _share(instruction: Instruction) -> float:
    return instruction.share / instruction.chunk[1]


def _whole(instruction: Instruction, num_bytes: float, ranks: int) -> float:
    """The tensor of which a rank counts `num_bytes` (`megalina.perfmodel.sim.sizes.own_bytes`)."""
    if instruction.op in (Op.TOKENS, Op.COUNTS):
        return num_bytes * ranks / (ranks - 1)
    return num_bytes * ranks if instruction.op in (Op.GATHER, Op.PARAMS) else num_bytes


def _on_link(instruction: Instruction, whole: float, ranks: int) -> float:
    """What leaves a rank where everybody sends to everybody."""
    rounds = 2 if instruction.op in (Op.SUM, Op.GRADS) else 1
    return rounds * whole * (ranks - 1) / ranks


def _medians(found: Mapping[tuple[Kept, float], Sequence[float]]) -> dict[tuple[Kept, float], float]:
    return {key: statistics.median(values) for key, values in found.items()}


def _low(values: Sequence[float]) -> float:
    """The lower quartile: what waits for a rank that is late takes longer than the wire."""
    return sorted(values)[len(values) // 4]


def _line(found: Mapping[float, float]) -> tuple[float, float]:
    """Latency and seconds a byte of a straight line through (bytes, seconds); 0 of what can't be told."""
    if not found:
        return 0.0, 0.0
    sizes, times = list(found), list(found.values())
    mean, mean_s = statistics.fmean(sizes), statistics.fmean(times)
    spread = sum((x - mean) ** 2 for x in sizes)
    slope = sum((x - mean) * (t - mean_s) for x, t in found.items()) / spread if spread else 0.0
    if slope <= 0:
        largest = max(sizes)
        return (0.0, found[largest] / largest) if largest else (mean_s, 0.0)
    return max(0.0, mean_s - slope * mean), slope


@dataclass(slots=True)
class MeasuredCosts:
    """Of the slowest rank.  `gradient_bytes`, `weight_bytes`: of an element."""

    gradient_bytes: int
    weight_bytes: int
    latency_s: float = 0.0
    s_per_byte: float = 0.0
    _seconds: dict[Kept, Points] = field(default_factory=dict)
    _bytes: dict[Kept, Points] = field(default_factory=dict)

    def add(self, of_ranks: Sequence[Sample]) -> None:
        """What all ranks saw of one more plan."""
        self.latency_s = max(self.latency_s, *(s.latency_s for s in of_ranks))
        self.s_per_byte = max(self.s_per_byte, *(s.s_per_byte for s in of_ranks))
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

    def sizes_of(self, scattered: Sequence[str]) -> Sizes:
        """`scattered`: buckets that ZeRO-1 shards."""
        return Sizes(self.sizes, scattered)


def _at(points: Points, share: float) -> float:
    """On the straight line through the first and the last point, never below 0; through one point and 0 where there is but
    one."""
    (first, low), (last, high) = points[0], points[-1]
    if first == last:
        return low * share / first
    slope = (high - low) / (last - first)
    return max(0.0, low + slope * (share - first))
