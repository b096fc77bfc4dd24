"""Ratios, bounds and the JSON of a setting, by hand."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.compare.results import (
    as_json,
    by_round,
    difference,
    in_own_time,
    lower_bound_s,
    plain_bound_s,
    slowest,
    tighter_bound_s,
    tuned_eager,
)
from tests.compare.made import measured

SECONDS = st.floats(1e-3, 1e3)


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    assert slowest([[1.0, 5.0], [2.0, 3.0]]) == [2.0, 5.0]
    with pytest.raises(ValueError, match="zip"):
        slowest([[1.0, 5.0], [2.0]])  # a rank that took fewer steps


def test_ratios_are_of_the_medians_of_each_round() -> None:
    eager = [2.0, 2.0, 9.0, 4.0, 4.0, 4.0]  # two rounds of three; an outlier in the first one
    assert by_round(eager, [1.0, 1.0, 1.0, 8.0, 8.0, 1.0], 3) == [2.0, 0.5]


@given(st.lists(SECONDS, min_size=6, max_size=6), SECONDS)
def test_ratios_do_not_change_with_the_clock(step_s: list[float], factor: float) -> None:
    base = list(reversed(step_s))
    scaled = by_round([factor * s for s in base], [factor * s for s in step_s], 2)
    assert scaled == pytest.approx(by_round(base, step_s, 2))
    assert by_round(step_s, step_s, 2) == pytest.approx([1.0] * 3)


def test_losses_are_compared_as_far_as_both_went() -> None:
    assert difference([2.0, 4.0], [2.0, 4.0]) == 0
    assert difference([2.0, 4.4, 99.0], [2.0, 4.0]) == pytest.approx(0.1)  # one searched longer
    assert difference([-1.1], [-1.0]) == pytest.approx(0.1)


def test_the_bound_is_of_what_packs_nothing() -> None:
    found = {
        "eager whole": measured(device_s=0.4, link_s=0.6),
        "flow": measured(device_s=0.45, link_s=0.55),
        "lina": measured(plan="lina: packing 2", device_s=0.1, link_s=0.1),  # fewer bytes: another task
    }
    assert lower_bound_s(found) == 0.55
    assert tighter_bound_s(found) == 0.55  # what comes before and after is less here
    assert tighter_bound_s({n: replace(m, in_turn_s=0.6 + i / 100) for i, (n, m) in enumerate(found.items())}) == 0.6
    assert lower_bound_s({**found, "serial": measured(device_s=0.4, link_s=0.2)}) == 0.4
    assert plain_bound_s(found) is None
    assert plain_bound_s({**found, "eager_plain": measured(device_s=0.4, link_s=0.7)}) == 0.7


def test_eager_is_its_fastest_variant() -> None:
    found = {
        "ddp": measured(median_step_s=0.1),
        "eager whole": measured(median_step_s=1.2),
        "eager 512 KiB": measured(median_step_s=1.0),
        "flow": measured(median_step_s=0.5),
    }
    assert tuned_eager(found) == "eager 512 KiB"
    assert tuned_eager(found | {"eager 1024 KiB": measured(median_step_s=0.9, step_s=[0.9])}) == "eager 512 KiB"  # it gave up
    setting = as_json("2x2", found)
    assert set(setting["strategies"]) == {*found, "eager"}
    assert setting["strategies"]["eager"] == setting["strategies"]["eager 512 KiB"]


def test_a_setting_has_the_keys_that_others_read() -> None:
    setting = as_json("2x2", {"eager whole": measured(), "flow": measured(ratio_to_eager=1.5, ratio_spread=(1.4, 1.6))})
    again = json.loads(json.dumps(setting, allow_nan=False))
    assert again.keys() >= {"name", "lower_bound_s", "overrun_fraction", "strategies"}
    for strategy in again["strategies"].values():
        assert strategy.keys() >= {
            *("median_step_s", "ratio_to_eager", "ratio_spread", "a2a_exposed_s", "grads_exposed_s", "a2a_slowdown_median"),
        }
    assert again["strategies"]["flow"]["ratio_spread"] == [1.4, 1.6]
    assert (again["name"], again["lower_bound_s"]) == ("2x2", 0.4)


@pytest.mark.parametrize(("overrun", "valid"), [(0.0, True), (0.05, True), (0.051, False)])
def test_one_strategy_that_overruns_makes_the_setting_invalid(overrun: float, valid: bool) -> None:
    setting = as_json("4x1", {"eager whole": measured(), "flow": measured(overrun_fraction=overrun)})
    assert (setting["overrun_fraction"], setting["valid"]) == (overrun, valid)


def test_times_of_slow_motion_are_given_in_the_clusters_own() -> None:
    clock = measured(median_step_s=3.0, link_s=1.0, step_s=[2.0, 4.0], ratio_to_eager=1.5, overrun_fraction=0.01, slowdowns=[1.2])
    own = in_own_time(clock, 2.0)
    assert (own.median_step_s, own.link_s, own.step_s, own.device_s) == (1.5, 0.5, [1.0, 2.0], clock.device_s / 2)
    assert (own.ratio_to_eager, own.overrun_fraction, own.slowdowns, own.peak_mb) == (1.5, 0.01, [1.2], clock.peak_mb)
    assert in_own_time(clock, 1.0) == clock
