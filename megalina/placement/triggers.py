"""Triggers: whether to plan anew once the router has spoken, since it chose otherwise than was expected (Lina, phase 2 in 5.2).

A trigger says True for planning anew.  All are pure, so ranks that have heard the same sums agree.  Where no rows came there
is nothing to gain: then all but `always` say False.

Shapes: E experts, N devices.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalina.placement.predictors.predictor import Floats

ROUNDING_ERROR = 1e-12  # of a distance between shares that are equal but for their scale


@dataclass(frozen=True, slots=True)
class Situation:
    """A layer's expectation and what came of it."""

    expected_E: Floats  # rows or shares, in any scale; all zero: nothing was known, uniform
    actual_E: NDArray[np.int64]  # rows that the router sends to each expert, of all ranks
    load_N: NDArray[np.int64]  # rows that each device would compute with the present placement and split
    replanned_load: int | None = None  # rows of the busiest device after planning anew; None: not known


def never(situation: Situation) -> bool:
    return False


def always(situation: Situation) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class OrderedTop:
    """The lists of the `num_experts` most popular experts differ, in their order too; Lina takes twice the router's top-k."""

    num_experts: int

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"the {self.num_experts} most popular experts are compared: compare at least 1")

    def __call__(self, situation: Situation) -> bool:
        expected, actual = (_most(x, self.num_experts) for x in (situation.expected_E, situation.actual_E))
        return _any_rows(situation) and not np.array_equal(expected, actual)


@dataclass(frozen=True, slots=True)
class TopSet(OrderedTop):
    """The sets of the `num_experts` most popular experts differ; their order does not matter."""

    def __call__(self, situation: Situation) -> bool:
        expected, actual = (_most(x, self.num_experts) for x in (situation.expected_E, situation.actual_E))
        return _any_rows(situation) and not np.array_equal(np.sort(expected), np.sort(actual))


@dataclass(frozen=True, slots=True)
class Distance:
    """The L1 distance of the expected from the actual shares passes a limit: from 0, equal, to 2, nothing in common."""

    limit: float

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 2:
            raise ValueError(f"the limit of the L1 distance is {self.limit}: shares are at most 2 apart, so give 0 to 2")

    def __call__(self, situation: Situation) -> bool:
        if not _any_rows(situation):
            return False
        distance = np.abs(_share(situation.expected_E) - _share(situation.actual_E)).sum()
        return bool(distance > self.limit + ROUNDING_ERROR)


@dataclass(frozen=True, slots=True)
class GainAboveCost:
    """The busiest device would save more time than planning anew takes, both measured before.

    Where the load after planning is not known, it is taken to be perfectly even, which no plan can better: the trigger then
    fires where there may be a gain, and never where there is none for certain."""

    row_s: float  # of computing one more row on the busiest device, with its share of the exchange
    replan_s: float  # of planning, telling the others, and fetching experts, as far as the computation waits for it

    def __post_init__(self) -> None:
        for name, seconds in (("row_s", self.row_s), ("replan_s", self.replan_s)):
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"{name} is {seconds} seconds: give a measured time, at least 0")

    def __call__(self, situation: Situation) -> bool:
        if not _any_rows(situation):
            return False
        load_N, after = situation.load_N, situation.replanned_load
        if after is None:
            after = -(-int(load_N.sum()) // len(load_N))
        return (int(load_N.max()) - after) * self.row_s > self.replan_s


def _any_rows(situation: Situation) -> bool:
    return bool(situation.actual_E.any())


def _most(popularity_E: NDArray[np.float64] | NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """The most popular experts, the most popular first; of two that are as popular the lower one first."""
    return np.argsort(-popularity_E, kind="stable")[:num_experts]


def _share(popularity_E: NDArray[np.float64] | NDArray[np.int64]) -> Floats:
    total = popularity_E.sum()
    return popularity_E / total if total else np.full(len(popularity_E), 1 / len(popularity_E))
