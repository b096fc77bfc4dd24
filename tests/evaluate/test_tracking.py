"""An evaluation as a run of W&B."""

import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megalina.config import WandbConfig
from megalina.evaluate.report import page
from tests.evaluate.made_evaluation import FAST, made
from tests.track.wandb_history import read_history


@pytest.fixture(scope="module")
def tracking() -> ModuleType:
    """Imported late: wandb and matplotlib take a second or two, which every process of the suite would pay."""
    return importlib.import_module("megalina.evaluate.tracking")


@pytest.mark.full
def test_wandb_gets_numbers_tables_plots_and_the_page(tracking: ModuleType, tmp_path: Path) -> None:
    found = made(FAST)
    for _ in range(2):  # each evaluation is a run of its own
        tracking.track(found, page(found), tmp_path, WandbConfig(mode="offline", name="a run, step 7: evaluation"))
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 2
    (record,) = read_history(tmp_path / "wandb")
    assert record["best/ratio_to_static_in_rounds"] == 2 and record["step"] == 7
    assert {f"{name}._type" for name in ("modes", "layers", "popularity", "latencies")} <= record.keys()
    pictures = {name for name in record if name.endswith("._type") and record[name] == "image-file"}
    assert pictures == {f"{n}._type" for n in ("latency", "device_load", "popularity_map", "layer_time", "foresight")}
    assert record["report._type"] == "html-file"


def test_numbers_for_wandb_are_complete_and_flat(tracking: ModuleType) -> None:
    found = made(FAST)
    found["modes"]["best"]["tasks"] = {
        "multiple_choice": {"num_tasks": 3, "accuracy": {"value": 0.5, "standard_error": None}},
        "cloze": None,
    }
    flat, shown = tracking.scalars_of(found), tracking.tables_of(found)
    assert flat["best/multiple_choice/accuracy"] == 0.5 and flat["window/layer_03/accuracy_recall"] == 0.75
    assert flat["static/ratio_to_static_interval_low"] == 1 and "static/accuracy_recall" not in flat
    numbers = {key for key, value in found["modes"]["best"].items() if isinstance(value, int | float)}
    assert {f"best/{key}" for key in numbers} <= flat.keys() and all(isinstance(value, float) for value in flat.values())
    assert [len(rows) for _, rows in shown.values()] == [4, 8, 8, 120]
    for columns, rows in shown.values():
        assert {len(row) for row in rows} == {len(columns)}


def test_a_tracker_that_fails_is_a_line_of_warning(
    tracking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("there is no network")

    monkeypatch.setattr(tracking, "EvaluationRun", fails)
    found = made(FAST)
    with caplog.at_level(logging.WARNING):
        tracking.track(found, page(found), tmp_path, WandbConfig(mode="online"))
    assert "there is no network" in caplog.text and len(caplog.records) == 1
