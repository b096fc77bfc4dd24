"""Times: what instructions of a run take, measured over some steps, for strategies that place by them.

They are those of the slowest rank, agreed by all, so that all place alike.
"""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megalina.mesh import Mesh, all_gather_object
from megalina.step.plan import Plan
from megalina.step.program import Program, shares_of
from megalina.timeline.instruction_times import times_of
from megalina.timeline.recorder import Event

logger = logging.getLogger("megalina")
STEPS = 3  # that times are measured over
SETTLE = 2  # steps of a plan without times that are not measured
WATCH = 50  # steps between looks
DRIFT = 0.25  # times that are off by this share are measured anew


class Times:
    """Measures a plan's times over some steps, and again from time to time.  All ranks call it alike.

    `adopt(plan)`: from the next step on; `program()`: the list that runs."""

    def __init__(self, mesh: Mesh, adopt: Callable[[Plan], object], program: Callable[[], Program]):
        self._mesh, self._adopt, self._program = mesh, adopt, program
        self._found: list[dict[str, float]] = []  # a step each
        self._to_wait = SETTLE  # steps until it measures

    def decided(self, plan: Plan) -> bool:
        """Whether the plan has times, or needs none."""
        return not _wanted(plan) or bool(plan.times_us)

    def measuring(self, plan: Plan) -> bool:
        """Whether the next step, one of this plan, must be recorded."""
        return _wanted(plan) and self._to_wait == 0

    def after(self, step: int, events: Callable[[], Sequence[Event]], plan: Plan) -> None:
        """Between two steps; `events` of `step`, which was a step of `plan`."""
        if not _wanted(plan):
            return
        if not plan.times_us:  # another plan than the one that it last looked at
            self._to_wait = min(self._to_wait, SETTLE)
        if self._to_wait:
            self._to_wait -= 1
            return
        self._found.append(times_of(events(), shares_of(self._program())))
        if len(self._found) < STEPS:
            return
        own = {kind: statistics.median(found[kind] for found in self._found) for kind in self._found[0]}
        everywhere = all_gather_object(self._mesh, own)
        kinds = sorted({kind for of_rank in everywhere for kind in of_rank})  # stages of a pipeline have kinds of their own
        slowest = {kind: max(of_rank[kind] for of_rank in everywhere if kind in of_rank) for kind in kinds}
        self._found, self._to_wait = [], WATCH
        if drifted(dict(plan.times_us), slowest):
            times_us = tuple((kind, round(us, 1)) for kind, us in sorted(slowest.items()))
            self._adopt(replace(plan, times_us=times_us, measured_at=step))
            if self._mesh.world.rank == 0:
                logger.info("times from step %d on, of the slowest rank: %s", step + 1, described(slowest))


def _wanted(plan: Plan) -> bool:
    """A list that was searched has its order already."""
    return plan.places_weights and not plan.order


def drifted(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether a plan with the times `before` should get those of `now`; {}: it had none."""
    differ = sum(abs(now.get(kind, 0.0) - before.get(kind, 0.0)) for kind in before.keys() | now.keys())
    return differ > DRIFT * sum(before.values())


def described(times_us: Mapping[str, float]) -> str:
    """For people: what takes longest first."""
    longest_first = sorted(times_us.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {us / 1e3:.2f} ms" for kind, us in longest_first if us >= 10)
