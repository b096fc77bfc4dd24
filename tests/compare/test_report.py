"""The tables, the picture and the common part of the JSON."""

from pathlib import Path
from typing import Any

import pytest

from megalina.compare.report import closing, draw_bars, draw_slowdowns, table, whole
from megalina.compare.results import as_json
from tests.compare.made import measured


def setting(name: str, flow: float, auto: float | None, **fields: Any) -> dict[str, Any]:
    """Eager takes 1 s; the others are so many times as fast."""
    found = {"eager whole": measured(), "flow": measured(ratio_to_eager=flow, median_step_s=1 / flow, **fields)}
    if auto is not None:
        found["auto"] = measured(ratio_to_eager=auto, median_step_s=1 / auto)
    return as_json(name, found)


def test_means_are_over_settings() -> None:
    result = whole([setting("a", 1.5, 1.4), setting("b", 0.8, 1.2)], note="emulated: devices")
    assert result.keys() >= {"settings", "mean_auto_ratio", "mean_best_ratio", "note", "paper"}
    assert result["mean_auto_ratio"] == pytest.approx((1.4 + 1.2) / 2)
    assert result["mean_best_ratio"] == pytest.approx((1.5 + 1.2) / 2)
    assert [s["name"] for s in result["settings"]] == ["a", "b"]


def test_without_auto_there_is_no_mean_of_it_and_where_nothing_wins_eager_is_best() -> None:
    result = whole([setting("a", 0.8, None)], note="")
    assert (result["mean_auto_ratio"], result["mean_best_ratio"]) == (None, 1.0)
    assert "mean of auto" not in closing(result)
    assert "mean of the best 1.00x" in closing(result)


def test_a_table_has_a_row_a_strategy_from_slow_to_fast() -> None:
    text = table(setting("4x1", 1.6, 1.25, a2a_slowdown_median=1.21, a2a_slowdown_p95=2.5, ratio_to_ddp=1.75, ratio_to_plain=1.8))
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split()[1] for row in rows] == ["eager", "auto", "flow"]  # of eager the variants alone
    assert all(row.count("|") == head.count("|") for row in rows)
    flow = [cell.strip() for cell in rows[-1].split("|")]
    assert flow[2:8] == ["625", "1.60", "0.90 - 1.10", "1.75", "1.80", "1.56, 1.56"]  # 0.625 s over bounds of 0.4 s
    assert "1.21, 2.50" in flow and "300, 200, 50" in flow
    assert "not valid" not in text


def test_an_invalid_run_and_one_without_bound_say_so() -> None:
    assert "overrun 7.0% (more than 5%: not valid)" in table(setting("4x1", 1.6, None, overrun_fraction=0.07))
    no_bound = as_json("1x2", {"eager whole": measured(device_s=0.0, link_s=0.0)})
    (row,) = table(no_bound).splitlines()[-1:]
    assert row.split("|")[7].strip() == ""


def test_the_plain_baselines_bound_stands_beside_the_others() -> None:
    found = {"eager whole": measured(), "eager_plain": measured(device_s=0.4, link_s=0.5, ratio_to_plain=1.0)}
    head, *_, row = table(as_json("4x2", found)).splitlines()
    assert "lower bound 400 ms, 400 ms with what must" in head and "500 ms with the plain baseline's bytes" in head
    assert "2.50, 2.50, 2.00" in row


def test_the_largest_difference_of_losses_is_told() -> None:
    result = whole([setting("a", 1.5, 1.4), setting("b", 1.1, 1.2, largest_loss_difference=3e-7)], note="emulated: devices")
    text = closing(result)
    assert "Losses differ by at most 3.0e-07." in text and "(emulated: devices)" in text
    assert "mean 1.57x" in text  # the paper's


@pytest.mark.parametrize("settings", [1, 3])
def test_bars_are_drawn(tmp_path: Path, settings: int) -> None:
    path = tmp_path / "bars.svg"
    draw_bars(path, whole([setting(f"setting {i}", 1.6, 1.4) for i in range(settings)], note="emulated: devices"))
    text = path.read_text()
    assert all(f"<!-- setting {i} -->" in text for i in range(settings))
    assert "<!--  1.60x -->" in text and "<!-- auto -->" in text


def test_slowdowns_are_drawn_of_strategies_that_have_some(tmp_path: Path) -> None:
    found = {"eager whole": measured(slowdowns=[1.2, 1.9]), "priority": measured(slowdowns=[1.0, 1.1, 1.3]), "fixed": measured()}
    path = tmp_path / "slowdowns.svg"
    draw_slowdowns(path, whole([as_json("4x1", found)], note="emulated: links"))
    text = path.read_text()
    assert "<!-- eager (2, at most 1.9) -->" in text and "<!-- priority (3, at most 1.3) -->" in text
    assert "<!-- fixed" not in text and "<!-- 4x1 -->" in text
