"""Windows: how many bytes of gradients fit into each gap that tokens leave on the wire, from what was measured.

Backward leaves two kinds of gaps: "experts", between the two all-to-alls of a layer, and "attention", from there to the next
layer's.  What fits into none goes in the tail.  FSMoE fills such windows from fitted costs of operations; here they are
what the steps of this run had, with the same plan, on the rank that had least.
"""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megalina.mesh import Mesh, all_gather_object
from megalina.step.passes import GAPS
from megalina.step.plan import Plan
from megalina.timeline.contention import class_of
from megalina.timeline.recorder import SEND, Event

logger = logging.getLogger("megalina")
STEPS = 3  # that windows are measured over
WATCH = 50  # steps between looks
DRIFT = 0.25  # windows that are off by this share are measured anew


def gap_seconds(events: Sequence[Event]) -> dict[str, float]:
    """The median length of each gap of one step, on one rank: from the end of an exchange of tokens to the start of the next.

    Of backward after the last of forward, as gradients are there in the last micro-batch alone: before it, gaps may hold tokens
    of another micro-batch's forward."""
    tokens = sorted((e for e in events if e.kind == SEND and class_of(e) == "a2a"), key=lambda e: e.start_s)
    last = max((i for i, e in enumerate(tokens) if e.phase == "F"), default=-1)
    sends = [e for e in tokens[last + 1 :] if e.phase == "B"]
    lengths: dict[str, list[float]] = {gap: [] for gap in GAPS.values()}
    for before, after in zip(sends, sends[1:], strict=False):
        if before.phase == "B" and before.name in GAPS:
            lengths[GAPS[before.name]].append(max(0.0, after.start_s - before.end_s))
    return {gap: statistics.median(found) if found else 0.0 for gap, found in lengths.items()}


def bytes_per_s(events: Sequence[Event]) -> float:
    """How fast gradients go that have the wire to themselves: the upper quartile over those that met no tokens; 0 where none
    did."""
    tokens = [e for e in events if e.kind == SEND and class_of(e) == "a2a"]
    rates = sorted(
        e.num_bytes / (e.end_s - e.start_s)
        for e in events
        if e.kind == SEND
        and e.op == "grads"
        and e.end_s > e.start_s
        and not any(t.start_s < e.end_s and e.start_s < t.end_s for t in tokens)
    )
    return rates[len(rates) * 3 // 4] if rates else 0.0


class Windows:
    """Measures windows over some steps, and again from time to time.  All ranks call it alike.

    `adopt(plan)`: from the next step on."""

    def __init__(self, mesh: Mesh, adopt: Callable[[Plan], object]):
        self._mesh, self._adopt = mesh, adopt
        self._found: list[dict[str, float]] = []  # bytes by gap, a step each; {} where a pipeline's stage sends no tokens
        self._to_wait = 2  # steps until it measures

    def decided(self, plan: Plan) -> bool:
        """Whether the plan has windows."""
        return bool(plan.gap_bytes)

    def measuring(self, plan: Plan) -> bool:
        """Whether the next step, one of this plan, must be recorded."""
        return self._to_wait == 0

    def after(self, step: int, events: Callable[[], Sequence[Event]], plan: Plan) -> None:
        """Between two steps; `events` of `step`, which was a step of `plan`."""
        if self._to_wait:
            self._to_wait -= 1
            return
        own = events()
        rate = bytes_per_s(own)
        sends = any(class_of(e) == "a2a" for e in own)
        self._found.append({gap: seconds * rate for gap, seconds in gap_seconds(own).items()} if sends else {})
        if len(self._found) < STEPS:
            return
        told = [found for found in self._found if found]
        medians = {gap: statistics.median(found[gap] for found in told) for gap in GAPS.values()} if told else {}
        everywhere = [of_rank for of_rank in all_gather_object(self._mesh, medians) if of_rank]
        gap_bytes = {gap: int(min((of_rank[gap] for of_rank in everywhere), default=0)) for gap in GAPS.values()}
        self._found, self._to_wait = [], WATCH
        if drifted(dict(plan.gap_bytes), gap_bytes):
            self._adopt(replace(plan, gap_bytes=tuple(sorted(gap_bytes.items())), measured_at=step))
            if self._mesh.world.rank == 0:
                logger.info("windows from step %d on: %s", step + 1, described(gap_bytes))


def drifted(before: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """Whether a plan with the windows `before` should get those of `now`; {}: it had none."""
    return not before or any(abs(now[gap] - before[gap]) > DRIFT * max(before[gap], now[gap]) for gap in now)


def described(gap_bytes: Mapping[str, int]) -> str:
    """For people."""
    names = {"experts": "between the two all-to-alls of a layer", "attention": "under the attention before it"}
    return "; ".join(f"{size / 2**20:.2f} MiB {names[gap]}" for gap, size in sorted(gap_bytes.items())) + "; the rest in the tail"
