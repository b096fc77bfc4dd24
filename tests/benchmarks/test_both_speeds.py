"""The ladder at both speeds: what runs in which order, and what the table says of it."""

import json
from pathlib import Path

import pytest

from benchmarks import both_speeds
from benchmarks.both_speeds import Found


def setting(auto_s: float, *, compute_s: float, overrun: float) -> Found:
    eager = {"median_step_s": 0.9, "compute_s": 0.4, "idle_s": 0.5}
    auto = {"median_step_s": auto_s, "compute_s": compute_s, "idle_s": auto_s - compute_s}
    return {"overrun_fraction": overrun, "strategies": {"eager whole": eager, "eager": eager, "auto": auto}}


def test_speeds_take_turns_and_the_table_says_where_the_longer_time_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran: list[float] = []

    def measured(name: str, strategies: str, slow_motion: float) -> Found:
        assert (name, strategies) == ("4x1 light", "auto")
        ran.append(slow_motion)
        return setting(0.5, compute_s=0.48, overrun=0.0) if slow_motion > 1 else setting(0.6, compute_s=0.49, overrun=0.012)

    monkeypatch.setattr(both_speeds, "measured", measured)
    assert both_speeds.main(["--only", "4x1 light", "--rounds", "2", "--json", str(tmp_path / "found.json")]) == 0
    assert ran == [3.0, 1.0, 1.0, 3.0]
    printed = capsys.readouterr().out
    assert "| 4x1 light | auto | 500 | 600 | 1.20 (1.20 to 1.20) | +10, +90 | 1.2% |" in printed
    assert "| 4x1 light | eager | 900 | 900 | 1.00 (1.00 to 1.00) | +0, +0 | 1.2% |" in printed and "whole" not in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["slow_motion"] == 3.0 and len(found["settings"]["4x1 light"]) == 2


def test_a_setting_that_the_ladder_has_not_stops_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert both_speeds.main(["--only", "4x1 light,4x9 light"]) == 2
    assert "--only: the ladder has no 4x9 light, only 4x1 light, " in capsys.readouterr().err
