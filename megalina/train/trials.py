"""Trials: measured steps choose among options, alike on all ranks: packings, numbers of a strategy, whole strategies.

A search asks one question after another, such as "how many chunks?".  Each alternative to the best option so far is tried for
a few whole steps, which hold all of its price.  At the end those that came out best are tried once more, and so is the one that
the search began with, which is left only for what is faster by more than the noise.  So a burst of noise, or a machine that
slowly warms up, moves nobody.  Afterwards the time of a step is watched; where it has drifted away, the search is repeated.

The tuner runs trials of plans between the steps of a run.
"""

import logging
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megalina.mesh import Mesh, all_gather_object
from megalina.step.plan import Plan

Option = TypeVar("Option", bound=Hashable)
Question = Callable[[Option], Sequence[Option]]  # the best option so far -> alternatives to it
logger = logging.getLogger("megalina")


ABOUT = 0.06  # two plans are about as fast: the order of a list gains as much


@dataclass(frozen=True, slots=True)
class Rules:
    """When to try, and when to be content."""

    warm_up_steps: int = 2  # of a process: not measured
    settle_steps: int = 1  # after a change: not measured
    window: int = 2  # steps that a trial is judged by
    finalists: int = 1  # so many are tried once more, besides the one that the search began with
    gain: float = 0.02  # the first option is left only for what saves this share of a step, and more than the noise
    watch: int = 50  # steps between looks at the time of a step, once an option is chosen
    drift: float = 0.25  # times of steps that are off by this share, twice in a row, are a reason to search again ...
    cool_down: int = 4  # ... after so many looks at least
    max_searches: int = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """How long a step takes, from the times of some."""

    typical_s: float
    error_s: float

    @staticmethod
    def of(times_s: Sequence[float]) -> "Measured":
        """Their median, and its standard error from the median deviation."""
        median_s = statistics.median(times_s)
        deviation_s = statistics.median(abs(t - median_s) for t in times_s)
        return Measured(median_s, 1.2533 * 1.4826 * deviation_s / len(times_s) ** 0.5)  # of a median; of normal noise

    @staticmethod
    def of_few(times_s: Sequence[float]) -> "Measured":
        """The shortest, as what disturbs a step makes it longer: of two or three the median may be disturbed itself."""
        return Measured(min(times_s), Measured.of(times_s).error_s)

    @staticmethod
    def slowest(of_ranks: Sequence["Measured"]) -> "Measured":
        return Measured(max(m.typical_s for m in of_ranks), max(m.error_s for m in of_ranks))

    def beats(self, other: "Measured", gain: float) -> bool:
        noise_s = 2 * (self.error_s**2 + other.error_s**2) ** 0.5
        return self.typical_s < other.typical_s * (1 - gain) - noise_s


class Trials(Generic[Option]):
    """Decides from measurements alone: no clock, no rank.  Equal measurements give equal decisions on all ranks.

    A search tries no option more than twice; there are at most `max_searches`, and between two of them it rests."""

    def __init__(
        self,
        questions: Sequence[Question[Option]],
        *,
        present: Option,
        rules: Rules = Rules(),
        searches: int = 0,
        cost_of: Callable[[Option], float] = lambda option: 0.0,
    ):
        """`searches`: that have come to an end before.  `cost_of`: in memory, say; what costs more must be faster by more than
        `rules.gain`."""
        self.questions, self.present, self.rules, self.searches = tuple(questions), present, rules, searches
        self.searching = searches == 0 and bool(questions)
        self._cost_of = cost_of
        self.tried: dict[Option, Measured] = {}  # in this search, or in the last one
        self._reference_s: float | None = None  # a step's time with what was chosen
        self._looks = self._odd_looks = 0
        self._begin()

    @property
    def done(self) -> bool:
        """Nothing will ever change again."""
        return not self.questions or (self.searches >= self.rules.max_searches and not self.searching)

    @property
    def steps_wanted(self) -> int:
        """Of how many steps the next measurement is."""
        return self.rules.window if self.searching else self.rules.watch

    def observe(self, measured: Measured) -> Option:
        """A measurement of steps under the present option; returns the option from now on."""
        if self.done:
            return self.present
        if self.searching:
            return self._try(measured)
        return self._look(measured)

    def _begin(self) -> None:
        self._start = self.present
        self._asked = 0  # questions
        self._queue: list[Option] = []
        self._finals = False
        if self.searching:
            self.tried = {}

    def _try(self, measured: Measured) -> Option:
        before = self.tried.get(self.present)
        self.tried[self.present] = measured if before is None else min(before, measured, key=lambda m: m.typical_s)
        while not self._queue and self._asked < len(self.questions):
            question = self.questions[self._asked]
            self._asked += 1
            self._queue = [option for option in dict.fromkeys(question(self.best())) if option not in self.tried]
        if not self._queue and not self._finals:
            self._finals = True
            if (best := self.best()) != self._start:
                ranked = sorted(self.tried, key=lambda o: self.tried[o].typical_s)
                finalists = [best, *(o for o in ranked if o not in (best, self._start))]
                self._queue = [self._start, *finalists[: self.rules.finalists]]
        if self._queue:
            self.present = self._queue.pop(0)
            return self.present
        best = self.best()
        worth = self.tried[best].beats(self.tried[self._start], self.rules.gain)
        self.present = best if worth else self._start
        self.searching = False
        self.searches += 1
        self._reference_s, self._looks, self._odd_looks = None, 0, 0
        return self.present

    def best(self) -> Option:
        """The fastest of those tried; of two that are as fast the one that costs less, or came first."""
        best = self.present
        for i, option in enumerate(sorted(self.tried, key=self._cost_of)):
            gain = self.rules.gain if self._cost_of(option) > self._cost_of(best) else 0.0
            if i == 0 or self.tried[option].typical_s < self.tried[best].typical_s * (1 - gain):
                best = option
        return best

    def _look(self, measured: Measured) -> Option:
        if self._reference_s is None:
            self._reference_s = measured.typical_s
            return self.present
        self._looks += 1
        odd = abs(measured.typical_s / self._reference_s - 1) > self.rules.drift
        self._odd_looks = self._odd_looks + 1 if odd else 0
        if self._odd_looks >= 2 and self._looks >= self.rules.cool_down:
            self.searching = True
            self._begin()
        return self.present


class Tuner:
    """Feeds trials with the times of all ranks and does what they decide.  All ranks call it alike.

    `adopt(plan)`: from the next step on; `note`: stands at the end of the evidence."""

    def __init__(self, trials: Trials[Plan], mesh: Mesh, adopt: Callable[[Plan], object], *, note: str = ""):
        self.trials, self.note, self._mesh, self._adopt = trials, note, mesh, adopt
        self._times_s: list[float] = []
        self._to_skip = trials.rules.warm_up_steps

    @property
    def of_other_packings(self) -> list[Plan]:
        """The fastest plan that was tried of each packing but the present one's, if it is about as fast."""
        tried, present = self.trials.tried, self.trials.present
        best: dict[int, Plan] = {}
        for plan in sorted(tried, key=lambda plan: tried[plan].typical_s):
            best.setdefault(plan.packing, plan)
        most_s = (1 + ABOUT) * tried[present].typical_s if present in tried else 0.0
        return [plan for k, plan in best.items() if k != present.packing and tried[plan].typical_s <= most_s]

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
        measured = Measured.slowest(all_gather_object(self._mesh, own))
        self._times_s = []
        before, searched, searching = trials.present, trials.searches, trials.searching
        plan = trials.observe(measured)
        if plan != before or (trials.searching and not searching):  # the run may walk a list that was found since
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
