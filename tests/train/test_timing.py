"""The timing of steps on two ranks: what it adds to records and to the run folder, and that it changes no number."""

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalina.config import TimelineConfig
from megalina.timeline.picture import FILE as PICTURE
from megalina.timeline.trace import FILE as TRACE
from megalina.train.timing import Timing, emulation_note
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import config_of, records_of, start, write_tokens

STEPS = 4


def timed(folder: Path, name: str, ep: int = 2, pp: int = 1, moved_after: int = 0, **timeline: Any) -> dict[str, Any]:
    """Four steps; their losses, records, and how many collectives they took.  `moved_after`: the step after which the mesh is
    another."""
    config = replace(config_of(folder, name, ep=ep, pp=pp), timeline=TimelineConfig(**timeline))
    run = start(config)
    timing = Timing(config, run.built)
    out: dict[str, Any] = {"losses": [], "records": [], "events": []}
    for step in range(1, STEPS + 1):
        recorder = timing.recorder(step)
        out["losses"].append(run.runner.compute(step, record=recorder)[0].loss)
        out["records"].append(timing.after(step, recorder))
        out["events"].append(len(recorder.events()) if recorder is not None else 0)
        if step == moved_after:
            run.built.mesh = replace(run.built.mesh)  # another one, though equal
    run.runner.close()
    return out | {"collectives": sum(run.runner.log._counts.values()), "alone": timing._alone}


def _scenarios(folder: Path) -> dict[str, Any]:
    return {
        "nothing": timed(folder, "nothing"),
        "metrics": timed(folder, "metrics", metrics=True),
        "trace": timed(folder, "trace", trace_steps=[2, 4]),
        "nowhere": timed(folder, "nowhere", trace_steps=[1]),
        "stages": timed(folder, "stages", ep=1, pp=2, metrics=True, trace_steps=[2]),
        "moved": timed(folder, "moved", moved_after=2, metrics=True, trace_steps=[2, 3]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_tokens(path / "tokens")
    (path / "nowhere").mkdir()
    (path / "nowhere" / TRACE).mkdir()  # a file can't be written there
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(2, _scenarios, folder)


@pytest.mark.full
def test_timing_changes_no_loss(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        alike = [scenario for name, scenario in found.items() if name != "stages"]  # whose sums are rounded in another way
        assert all(scenario["losses"] == found["nothing"]["losses"] for scenario in alike)


def test_without_a_wish_nothing_is_recorded_and_nothing_sent(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["nothing"]["events"] == [0] * STEPS
        assert found["nothing"]["records"] == [{}] * STEPS
        assert found["trace"]["collectives"] > found["nothing"]["collectives"]  # the calibration
        assert found["metrics"]["collectives"] > found["trace"]["collectives"]  # and what groups agree on in each step


def test_every_record_has_the_contention_of_its_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        records = found["metrics"]["records"]
        assert len(records) == STEPS
        for record in records:
            assert record["a2a_slowdown"] > 0 and record["a2a_wire_s"] > 0 and record["grads_wire_s"] > 0
            assert record["a2a_exposed_s"] >= 0 and 0 < record["idle_share"] < 1
            assert record["params_wire_s"] == 0
    assert ranks[0]["metrics"]["alone"] == ranks[1]["metrics"]["alone"]
    assert ranks[0]["metrics"]["alone"].keys() == {"tokens", "grads"}


def test_chosen_steps_of_all_ranks_are_in_one_trace_and_a_picture(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert [n > 0 for n in ranks[1]["trace"]["events"]] == [False, True, False, True]
    assert ranks[0]["trace"]["records"] == [{}] * STEPS
    lines = json.loads(gzip.decompress((folder / "trace" / TRACE).read_bytes()))["traceEvents"]
    assert steps_of(folder / "trace" / TRACE) == {(rank, f"step {step}") for rank in (0, 1) for step in (2, 4)}
    arrows = [x for x in lines if x["ph"] == "s"]
    assert len(arrows) == 2 * 2 * 2 * 4 * 2  # ranks, steps, layers, all-to-alls a layer, micro-batches
    exchanges = [x["args"] for x in lines if x["ph"] == "X" and x["cat"] == "tokens"]
    assert len(exchanges) == len(arrows)
    assert all(x["group"] == "0 1" and x["bytes"] > 0 and x["slowdown"] > 0 for x in exchanges)
    assert (folder / "trace" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert not (folder / "metrics" / TRACE).exists()


def test_each_rank_of_a_pipeline_tells_its_waits_and_its_cells(ranks: list[dict[str, Any]], folder: Path) -> None:
    first, second = (found["stages"]["records"] for found in ranks)
    for own, other in zip(first, second, strict=True):
        both = own["stage_idle_shares"]
        assert both == other["stage_idle_shares"] == [own["idle_share"], other["idle_share"]]
        assert own["stage_pp_exposed_s"] == [own["pp_exposed_s"], other["pp_exposed_s"]] and min(own["stage_pp_exposed_s"]) > 0
        assert own["stage_a2a_exposed_s"] == [own["a2a_exposed_s"], other["a2a_exposed_s"]]
        assert own["pp_bytes"] == other["pp_bytes"] > 0
    path = folder / "stages" / TRACE
    assert steps_of(path) == {(0, "step 2"), (1, "step 2")}
    lines = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert [x["args"]["name"] for x in lines if x["name"] == "process_name"] == [
        "rank 0 (pipeline rank 0: stage 0)",
        "rank 1 (pipeline rank 1: stage 1)",
    ]
    cells = {rank: [x["name"] for x in lines if x.get("cat") == "cells" and x["pid"] == rank] for rank in (0, 1)}
    assert cells == {
        0: ["0F0", "0F1", "0B0", "0F2", "0B1", "0F3", "0B2", "0B3"],
        1: ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2", "1F3", "1B3"],
    }
    messages = [x["args"] for x in lines if x.get("cat") == "messages"]
    assert len(messages) == 2 * 8 and all(x["group"] == "0 1" and x["axis"] == "pp0-1" for x in messages)
    assert (folder / "stages" / PICTURE).read_bytes().startswith(b"\x89PNG")


def steps_of(path: Path) -> set[tuple[int, str]]:
    """(rank, step) in a trace."""
    lines = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {(x["pid"], x["name"]) for x in lines if x["ph"] == "X" and x["cat"] == "step"}


def test_a_timing_that_moves_keeps_what_was_traced_and_calibrates_anew(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert steps_of(folder / "moved" / TRACE) == {(rank, f"step {step}") for rank in (0, 1) for step in (2, 3)}
    assert ranks[0]["moved"]["collectives"] > ranks[0]["metrics"]["collectives"]
    assert all(record["a2a_slowdown"] > 0 for record in ranks[0]["moved"]["records"])


def test_a_run_has_it_in_its_records_and_its_folder(folder: Path) -> None:
    timeline = TimelineConfig(metrics=True, trace_steps=[2])
    config = replace(config_of(folder, "run", ep=1, steps=3), timeline=timeline)
    records = records_of(config).records
    assert [0 < record["idle_share"] < 1 for record in records] == [True] * 3
    assert [record["a2a_slowdown"] for record in records] == [None] * 3  # one rank
    assert steps_of(folder / "run" / TRACE) == {(0, "step 2")}
    assert (folder / "run" / PICTURE).exists()


def test_a_trace_that_cannot_be_written_is_a_warning(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert len(ranks[0]["nowhere"]["losses"]) == STEPS
    assert not (folder / "nowhere" / PICTURE).exists()


def test_the_warning_names_step_and_reason(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        timed(folder, "nowhere", ep=1, trace_steps=[1])
    assert "the timeline of step 1 could not be written: " in caplog.text
    assert TRACE in caplog.text


def test_figures_say_what_is_emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, "emulated")
    real = start(config).built.trainable
    fake = start(replace(config, cluster=replace(config.cluster, experts_ms=1.0))).built.trainable
    monkeypatch.delenv("MEGALINA_LINK_MBIT", raising=False)
    assert (emulation_note(real), emulation_note(fake)) == ("", "emulated devices")
    monkeypatch.setenv("MEGALINA_SLOWDOWN", "200")
    assert emulation_note(real) == "all times 200x dilated"
    monkeypatch.setenv("MEGALINA_LINK_MBIT", "500")
    assert emulation_note(fake) == "emulated devices, emulated links of 500 Mbit/s, all times 200x dilated"
