"""Forecasts against steps: parts of a step, and what the error is made of; contention's summary."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.measure.check import (
    BETWEEN,
    Checked,
    as_json,
    busy,
    checked,
    mean_parts,
    median_parts,
    overrides_of,
    parts_of,
    table,
    trial_run,
    whole,
)
from megalina.measure.cluster_file import cluster_of
from megalina.measure.collectives import summary
from megalina.measure.figures import figures_of
from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event
from megalina.validate import check_config
from tests.measure import made
from tests.train.small_run import config_of, write_tokens


def event(kind: str, name: str, start_s: float, end_s: float, *, op: str = "", phase: str = "F", exposed_s: float = 0.0) -> Event:
    return Event(kind, f"{phase}:{name}", phase, name, 0, "0", op, "ep" if op else "", 8, start_s, start_s, end_s, exposed_s)


def test_parts_are_instructions_by_name_and_waits_by_what_is_awaited() -> None:
    events = [
        event(COMPUTE, "attention", 0, 1),
        event(COMPUTE, "attention", 1, 3),
        event(COMPUTE, "attention", 3, 4, phase="B"),
        event(COMPUTE, "update dense.0", 4, 5, phase="U"),
        event(COMPUTE, "update ends", 5, 7, phase="U"),
        event(SEND, "dispatch", 0, 9, op="params"),
        event(WAIT, "dispatch", 0, 9, op="tokens", exposed_s=0.5),
        event(WAIT, "counts", 0, 9, op="counts", exposed_s=0.25),
    ]
    assert parts_of(events) == {"F attention": 3, "B attention": 1, "U update": 3, "waits for a2a": 0.5, "waits for other": 0.25}


def test_parts_of_steps_and_ranks_may_be_missing() -> None:
    assert median_parts([{"a": 1.0}, {"a": 2.0, "b": 3.0}, {"a": 9.0, "b": 5.0}]) == {"a": 2.0, "b": 3.0}
    assert mean_parts([{"a": 1.0}, {"a": 2.0, "b": 3.0}]) == {"a": 1.5, "b": 1.5}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_configurations_run_on_any_number_of_ranks(world: int) -> None:
    found = overrides_of(world)
    assert set(found) == {"laptop", "copies", "wide"}
    for words in found.values():
        check_config(compose(words), world)


def test_a_forecast_that_is_right_has_no_error_and_one_that_is_not_says_where() -> None:
    machine = made.machine()
    config = PretrainConfig(cluster=cluster_of("made", machine, figures_of(machine)))
    config.model.vocab_size = 512
    measured = {"step_s": 1.0, "computed_s": 1.0, "core_share": 0.5, "parts": {}}
    parts = {part: predicted for part, (predicted, _) in checked("x", config, 2, vocab_size=512, measured=measured).parts.items()}
    computes_s = sum(s for part, s in parts.items() if not part.startswith("waits"))
    step_s = checked("x", config, 2, vocab_size=512, measured=measured).predicted_s
    exact = checked(
        "x", config, 2, vocab_size=512, measured={"step_s": step_s, "computed_s": computes_s, "core_share": 1.0, "parts": parts}
    )
    assert exact.error == 0 and {difference for _, difference in exact.causes} == {0}
    assert exact.computed_s == pytest.approx((computes_s, computes_s))
    assert step_s == pytest.approx(sum(parts.values()))
    assert whole({"F experts": 1.0}, 1.5) == {"F experts": 1.0, BETWEEN: 0.5}
    slower = parts | {"F experts": parts["F experts"] + 5.0, BETWEEN: 7.0}
    off = checked("x", config, 2, vocab_size=512, measured={**measured, "step_s": 2 * step_s, "parts": slower})
    assert off.error == pytest.approx(-0.5)
    assert [part for part, _ in off.causes[:2]] == [BETWEEN, "F experts"]
    assert [difference for _, difference in off.causes[:2]] == pytest.approx([parts[BETWEEN] - 7, -5])


def test_the_table_names_the_largest_causes_and_disturbed_runs_are_told() -> None:
    rows = [
        Checked("quiet", 0.9, 1.0, (0.8, 0.7), 0.97, {"F experts": (0.4, 0.5), "F route": (0.1, 0.1)}),
        Checked("gpu", 1.1, 1.0, None, None, {"F experts": (0.5, 0.4)}),
    ]
    text = table(rows)
    assert "-10%" in text and "+14%" in text and "+10%" in text
    assert text.index("F experts") < text.index("F route")
    assert busy(rows) == [] and busy([replace(rows[0], core_share=0.5)]) == ["quiet (50%)"]
    assert as_json(rows)["gpu"]["computed_s"] is None


def test_contention_counts_what_all_ranks_saw_together_with_the_smallest_slowdown() -> None:
    first = [[(2.0, True), (4.0, True), (9.0, False)], [(6.0, True)]]
    second = [[(3.0, True), (3.0, True), (1.0, True)], [(8.0, False)]]
    assert summary([first, second], alone_s=1.0) == {"count": 2, "median": 2.5, "p95": 3.0}
    assert summary([[[(1.0, False)]]], alone_s=1.0) == {"count": 0, "median": None, "p95": None}


@pytest.mark.full
def test_a_trial_run_is_told_by_its_parts(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found = trial_run(config_of(tmp_path, "trial"), torch.device("cpu"), steps=2)
    assert found["step_s"] > 0 and found["computed_s"] > 0 and 0 < found["core_share"] <= 1.1
    assert sum(found["parts"].values()) == pytest.approx(found["step_s"], rel=0.5)
    assert found["parts"].keys() >= {"F attention", "B experts", "waits for a2a"}
