"""Triggers: each fires for what it is meant to see, and for nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.placement.triggers import Distance, GainAboveCost, OrderedTop, Situation, TopSet, always, never

EXPECTED = [0.4, 0.3, 0.2, 0.1]


def situation(
    actual: list[int], expected: list[float] = EXPECTED, loads: tuple[int, ...] = (60, 40), after: int | None = None
) -> Situation:
    return Situation(np.array(expected), np.array(actual), np.array(loads), after)


def test_always_and_never() -> None:
    assert always(situation([0] * 4)) and not never(situation([0, 0, 0, 100]))


@pytest.mark.parametrize(
    ("actual", "ordered", "unordered"),
    [
        ([40, 30, 20, 10], False, False),
        ([90, 8, 1, 1], False, False),  # the same list, whatever the numbers
        ([40, 30, 10, 20], False, False),  # differs after the second
        ([30, 40, 20, 10], True, False),
        ([40, 20, 30, 10], True, True),
        ([50, 50, 0, 0], False, False),  # of two that are as popular the lower one comes first
        ([25, 25, 25, 25], False, False),
        ([0, 0, 0, 0], False, False),  # nothing to gain
    ],
)
def test_lists_and_sets_of_the_most_popular(actual: list[int], ordered: bool, unordered: bool) -> None:
    assert OrderedTop(2)(situation(actual)) == ordered
    assert TopSet(2)(situation(actual)) == unordered


def test_without_rows_there_is_nothing_to_gain() -> None:
    nothing = situation([0] * 4, [0.1, 0.2, 0.3, 0.4], loads=(0, 0))
    assert not any(trigger(nothing) for trigger in (OrderedTop(2), TopSet(2), Distance(0.0), GainAboveCost(1.0, 0.0)))


def test_more_experts_than_there_are_means_all() -> None:
    assert not OrderedTop(9)(situation([4, 3, 2, 1])) and OrderedTop(9)(situation([4, 3, 1, 2]))
    assert not TopSet(9)(situation([1, 2, 3, 4]))


def test_distance_is_between_shares() -> None:
    assert not Distance(0.0)(situation([4, 3, 2, 1])) and not Distance(0.0)(situation([3, 2, 2, 1], [0.375, 0.25, 0.25, 0.125]))
    moved = situation([30, 40, 20, 10])  # 0.2 apart
    assert Distance(0.19)(moved) and not Distance(0.21)(moved)
    apart = situation([0, 0, 0, 5], [7.0, 0.0, 0.0, 0.0])
    assert Distance(1.9)(apart) and not Distance(2.0)(apart)
    unknown = situation([5, 5, 5, 5], [0.0] * 4)
    assert not Distance(0.0)(unknown) and Distance(0.0)(situation([5, 5, 5, 6], [0.0] * 4))
    assert not Distance(0.0)(situation([0] * 4))


def test_the_gain_must_pass_the_cost() -> None:
    trigger = GainAboveCost(row_s=1e-3, replan_s=5e-3)
    actual = [40, 30, 20, 10]
    assert trigger(situation(actual, after=54)) and not trigger(situation(actual, after=55))
    assert trigger(situation(actual))  # 50 rows each at best
    assert not trigger(situation(actual, loads=(55, 45))) and not trigger(situation([0] * 4, loads=(0, 0)))
    assert not trigger(situation(actual, after=70))  # worse than now
    assert not GainAboveCost(1.0, 0.0)(situation([1, 0, 0, 0], loads=(1, 0)))  # a row cannot be halved


@given(
    actual=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(1, 8),
)
def test_what_is_as_expected_fires_nothing_and_a_set_fires_no_more_than_a_list(actual: list[int], seed: int, number: int) -> None:
    as_expected = situation(actual, [x / 7 for x in actual])
    assert not OrderedTop(number)(as_expected) and not TopSet(number)(as_expected) and not Distance(0.0)(as_expected)
    other = situation(actual, np.random.default_rng(seed).permutation(actual).tolist())
    assert OrderedTop(number)(other) or not TopSet(number)(other)


def test_fields_out_of_range_are_refused() -> None:
    for trigger in (OrderedTop, TopSet):
        with pytest.raises(ValueError, match="compare at least 1"):
            trigger(0)
    with pytest.raises(ValueError, match="give 0 to 2"):
        Distance(2.5)
    for row_s, replan_s, name in ((-1.0, 0.0, "row_s"), (0.0, float("nan"), "replan_s"), (0.0, float("inf"), "replan_s")):
        with pytest.raises(ValueError, match=f"{name} is .* seconds"):
            GainAboveCost(row_s, replan_s)
