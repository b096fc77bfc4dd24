"""The simulator's speed: the slope on made figures, what counts as missed, and a run of small sizes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import simulator_speed
from benchmarks.simulator_speed import Row, main, print_all, slope

ROWS = [Row("layers", n, n, list_s=n * 1e-5, fold_s=9.0, walk_s=n * 2e-5, peak_mib=200.0) for n in (100, 200, 400, 800)]
FAST = {"what": "eager", "operations": 10, "cpu_s": 1.0, "layers": 48, "ranks": 1024, "peak_mib": 300.0}


def test_the_slope_is_of_lists_and_walks() -> None:
    assert slope(ROWS) == pytest.approx(1.0)
    assert slope([replace(r, walk_s=r.operations**2 * 1e-5, list_s=0.0) for r in ROWS]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("slopes", "slowest", "searched", "met"),
    [
        ({"layers": 1.1}, {}, {"cpu_s": 50.0, "candidates": 550, "fit": 9}, True),
        ({"layers": 1.2}, {}, None, False),
        ({"layers": 1.0}, {"cpu_s": 2.5}, None, False),
        ({"layers": 1.0}, {"peak_mib": 2000.0}, None, False),
        ({"layers": 1.0}, {}, {"cpu_s": 70.0, "candidates": 550, "fit": 9}, False),
        ({"layers": 1.0}, {}, {"cpu_s": 7.0, "candidates": 50, "fit": 9}, False),
    ],
)
def test_what_is_missed_is_said(slopes, slowest, searched, met: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_all(ROWS, slopes, FAST | slowest, searched) is met
    assert ("MISSED" in capsys.readouterr().out) is not met


@pytest.mark.full
def test_small_sizes_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_speed, "STEEPEST", 9.0)  # times are noise here
    monkeypatch.setattr(simulator_speed, "TARGET_STEP_MIB", 1e9)  # it is the memory of all tests in this process
    out = tmp_path / "speed.json"
    assert main(["--quick", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    layers = [r["operations"] for r in found["rows"] if r["varied"] == "layers"]
    assert layers == sorted(set(layers)) and set(found["slopes"]) == {"layers", "chunks", "pieces"}
    assert found["slowest_step"]["cpu_s"] > 0 and found["search"] is None


def test_a_folder_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "nowhere/speed.json"]) == 2
    assert "there is no folder" in capsys.readouterr().err
