"""The tuner: trials of plans between the steps of a run, and what they choose, on all ranks alike."""

import logging
from collections.abc import Callable

from megalina.mesh import Mesh, everybodys
from megalina.step.plan import Plan
from megalina.train.trials import Measured, Trials

logger = logging.getLogger("megalina")


class Tuner:
    """Feeds trials with the times of all ranks and does what they decide.  All ranks call it alike.

    `adopt(plan)`: from the next step on; `note`: stands at the end of the evidence."""

    def __init__(self, trials: Trials[Plan], mesh: Mesh, adopt: Callable[[Plan], object], *, note: str = ""):
        self.trials, self.note, self._mesh, self._adopt = trials, note, mesh, adopt
        self._times_s: list[float] = []
        self._to_skip = trials.rules.warm_up_steps

    def after(self, step: int, step_s: float) -> None:
        """Between two steps: `step` took this rank so long."""
        trials = self.trials
        if trials.done:
            return
        if self._to_skip:
            self._to_skip -= 1
            return
        self._times_s.append(step_s)
        if len(self._times_s) < trials.steps_wanted:
            return
        own = Measured.of_few(self._times_s) if trials.searching else Measured.of(self._times_s)
        measured = Measured.slowest(everybodys(self._mesh, own))
        self._times_s = []
        before, searched = trials.present, trials.searches
        plan = trials.observe(measured)
        if plan != before:
            self._to_skip = trials.rules.settle_steps
            self._adopt(plan)
        if trials.searches > searched and self._mesh.world.rank == 0:
            logger.info("%s", evidence(trials, step, self.note))


def evidence(trials: Trials[Plan], step: int, note: str = "") -> str:
    """What a search has found, in one line."""
    rules, fastest_first = trials.rules, sorted(trials.tried.items(), key=lambda item: item[1].typical_s)
    times = "; ".join(f"{measured.typical_s * 1e3:.1f} ms {plan}" for plan, measured in fastest_first)
    return (
        f"plan from step {step + 1} on: {trials.present} (tried, fastest of {rules.window} steps, of the slowest rank: {times}; "
        f"the first one is left for a gain above {rules.gain:.0%} and noise{note})"
    )
