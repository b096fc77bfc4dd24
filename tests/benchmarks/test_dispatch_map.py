"""The map of dispatches: a point, what pays, and the table."""

import pytest

from benchmarks.scale.dispatches import DISPATCHES, DispatchPlace, dispatch_places, dispatch_table, pays, simulated

PLACE = DispatchPlace("64 experts top-6 (DeepSeek-V2-Lite)", 64, 16, 100)


def test_a_token_sent_once_takes_fewer_bytes_and_slow_links_less_time() -> None:
    point = simulated(PLACE)
    assert point["domains"] == 2
    saved = [point["bytes_to_rows"][dispatch] for dispatch in DISPATCHES]
    assert saved[0] == 1.0 and saved[0] > saved[1] > saved[2]
    eager = [point["step_s"]["eager"][dispatch] for dispatch in DISPATCHES]
    assert eager[0] > eager[1] > eager[2]
    assert point["step_s"]["flow"]["rows"] <= eager[0]
    assert PLACE.title in dispatch_table([point]) and pays(point) == "once_per_node"


def test_nothing_pays_that_is_no_faster() -> None:
    point = {
        "step_s": {"eager": dict.fromkeys(DISPATCHES, 1.0), "flow": {"rows": 0.9, "once_per_rank": 0.89, "once_per_node": 0.9}}
    }
    assert pays(point) == "nothing"
    point["step_s"]["eager"]["once_per_node"] = 0.8
    assert pays(point) == "once_per_node"


@pytest.mark.parametrize(("quick", "points"), [(True, 4), (False, 48)])
def test_points(quick: bool, points: int) -> None:
    assert len(list(dispatch_places(quick=quick))) == points
