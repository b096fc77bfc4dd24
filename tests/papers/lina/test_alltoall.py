"""The analysis of all-to-alls, with numbers worked out by hand, and its tables."""

import json
from dataclasses import replace

import pytest

from megalina.timeline.contention import Alone
from megalina.timeline.recorder import Event
from papers.lina.alltoall import Analysis, analysis_of, as_json
from papers.lina.alltoall_tables import report
from tests.timeline.made import compute, event, grads, tokens, wait

ALONE = {"tokens": Alone(0.0, 0.001)}  # 1,000 bytes: 1 s


def step(clock_s: float, late_s: float = 0.0) -> list[Event]:
    """Ten seconds of one rank, which comes to its exchanges so much later than it might."""
    a, b = clock_s + late_s, clock_s
    return [
        compute("attention", b, a + 1, layer=0),
        compute("route", a + 1, a + 2, layer=0),
        tokens("dispatch", a + 2, b + 4, layer=0),
        wait("dispatch", a + 2, b + 4, 2.0 - late_s, layer=0),
        compute("experts", b + 4, b + 5, layer=0),
        grads("dense.0", b + 5, b + 9),
        compute("shared", b + 5, b + 6, layer=0, phase="B"),
        tokens("combine", b + 5, b + 8, layer=0, phase="B"),
        wait("combine", b + 6, b + 8, 2.0, layer=0, phase="B"),
        wait("dense.0", b + 8, b + 9, 1.0, "grads", phase="B"),
        compute("update dense.0", b + 9, b + 10, phase="U"),
    ]


def analysed(strategy: str = "eager") -> Analysis:
    """Two steps of four ranks in two groups; in each group the second rank is late by half a second."""
    steps = [[step(100.0 * n + i, 0.5 * (i % 2)) for i in range(4)] for n in (1, 2)]
    return analysis_of(steps, ALONE, groups=[[0, 1], [2, 3]], experts=4, strategy=strategy)


def test_times_are_of_all_ranks() -> None:
    found = analysed()
    assert (found.ep, found.ranks, found.step_s) == (2, 4, 10)
    assert (found.a2a_wire_s, found.a2a_share) == (4.75, pytest.approx(0.475))  # 5 and 4.5 s
    assert (found.a2a_exposed_s, found.grads_wire_s, found.grads_exposed_s) == (3.75, 4, 1)
    assert found.idle_share == pytest.approx((0.5 + 0.45) / 2)
    assert found.busy_under_a2a == pytest.approx((1 / 5 + 1 / 4.5) / 2)  # the shared experts' second


def test_the_late_rank_says_how_much_an_exchange_was_slowed() -> None:
    found = analysed()
    assert found.slowdowns_under_grads == [3] * 4  # 2 steps x 2 groups
    assert found.slowdowns_clear == [1.5] * 4


def test_the_layer_is_a_mean_over_ranks() -> None:
    found = analysed()
    assert found.layer_s == {"route": 1, "all-to-all dispatch": 1.75, "experts": 1}
    assert found.layer_a2a_share == pytest.approx(1.75 / 3.75)


def test_the_tables_say_our_numbers_and_the_papers() -> None:
    text = report([analysed("ddp")], steps=2, note="emulated devices")
    assert text.startswith("4 ranks, strategy ddp, 2 steps; emulated devices\n")
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "4 2 10,000.0 4,750.0 47.5% 3,750.0 37.5% 35.4 to 38.2%" in rows
    assert "all-to-all dispatch 1,750.0" in rows
    assert "all-to-alls, share 46.7%" in rows
    assert "4 4 3.00 3.00 3.00 4 1.50 1.50 1.50" in rows
    assert "paper 1,500 1.83 - 4.14 - - - -" in rows
    assert "4 47.5% 21.1% 1,000.0" in rows


def test_devices_whose_math_was_late_are_said_to_be_no_measure() -> None:
    assert "not valid" not in report([replace(analysed(), overrun_fraction=0.05)], steps=2)
    second = report([analysed(), replace(analysed(), overrun_fraction=0.19)], steps=2).splitlines()[1]
    assert second.startswith("not valid: the real math was late by 19.0% of the devices' time")


def test_the_json_has_every_slowdown_and_null_for_no_quantile() -> None:
    quiet = analysis_of(
        [[[compute("attention", 0, 1), event("send", "dispatch", 0, 1, op="tokens", axis="ep")]]],
        {},
        groups=[[0]],
        experts=2,
        strategy="eager",
    )
    found = json.loads(json.dumps(as_json([analysed(), quiet], steps=2, note="")))
    assert found["steps"] == 2 and len(found["settings"]) == 2
    first, second = found["settings"]
    assert first["slowdowns_under_grads"] == [3] * 4 and first["slowdown_under_grads_median"] == 3
    assert second["slowdown_under_grads_median"] is second["slowdown_clear_p95"] is None
