"""The benchmark of dense training: what is drawn and tabulated of made points; a few steps from end to end."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dense_training import Point, Quiet, draw, in_turns, main, models_of, rules_of, speed_table, table
from megalina.compose import compose
from megalina.validate import check_config

POINT = Point("DS-MoE, ALPHA 0.001", "top_k 2", 0, 0.25, 3.0)


def test_means_over_seeds_and_their_spread_are_shown(tmp_path: Path) -> None:
    points = [POINT, replace(POINT, seed=1, loss=3.5), replace(POINT, model="dense", rule="all", active_fraction=1.0)]
    assert "| DS-MoE, ALPHA 0.001 | top_k 2 | 0.250 | 3.2500 | 0.5000 |" in table(points)
    draw(tmp_path / "curves.svg", points)
    assert "active fraction" in (tmp_path / "curves.svg").read_text() or (tmp_path / "curves.svg").stat().st_size > 1000


def test_speeds_are_held_to_the_dense_model_of_the_same_round() -> None:
    """The machine is half as fast in the second round: that changes tokens/s and no ratio."""
    took_s = {("dense", "all"): [2.0, 4.0, 2.0], ("DS-MoE", "all"): [4.0, 8.0, 4.0], ("DS-MoE", "top_k 1"): [1.0, 2.0, 0.5]}
    dense, whole, few = in_turns(took_s, 1000)
    assert (dense.tokens_per_s, dense.ratio_to_dense) == (500, 1) and whole.ratio_range == (0.5, 0.5)
    assert (few.ratio_to_dense, few.ratio_range) == (2, (2, 4))
    assert "| DS-MoE | top_k 1 | 1,000 | 2.00x | 2.00 to 4.00x |" in speed_table([few])


def test_models_compose_and_rules_use_fewer_experts_than_there_are() -> None:
    for name, overrides in models_of([0.0, 1e-3]).items():
        check_config(compose(["experiment=laptop", "launch.ranks=2", *overrides]), 2)
        rules = rules_of(name, 4)
        assert list(rules)[0] == "all" and all(rule is None or rule.k < 4 for rule in rules.values())


def test_an_override_that_means_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--steps", "2", "model.num_heads=3"]) == 2
    assert "model.num_heads (3) must divide model.d_model (128)" in capsys.readouterr().err


@pytest.mark.full
def test_a_few_steps_from_end_to_end(tmp_path: Path) -> None:
    out, picture = tmp_path / "dense.json", tmp_path / "dense.png"
    small = ["model.d_model=32", "model.num_heads=4", "train.eval_sequences=4"]
    assert main(["--seeds", "1", "--steps", "2", "--alphas", "0.001", "--json", str(out), "--picture", str(picture), *small]) == 0
    result = json.loads(out.read_text())
    points, speeds = result["points"], result["speeds"]
    assert {(s["model"], s["rule"]) for s in speeds if s["rule"] != "training"} == {(p["model"], p["rule"]) for p in points}
    assert [s["model"] for s in speeds if s["rule"] == "training"] == ["dense", "sparse", "DS-MoE, ALPHA 0.001"]
    assert {p["model"] for p in points} == {"dense", "sparse", "DS-MoE, ALPHA 0.001"}
    found = {p["rule"]: p for p in points if p["model"].startswith("DS-MoE")}
    assert found["all"]["active_fraction"] == 1 and found["top_k 2"]["active_fraction"] == 0.25
    assert found["threshold 0.25"]["active_fraction"] > found["threshold 1.5"]["active_fraction"]
    assert picture.stat().st_size > 1000


@pytest.mark.full
def test_half_a_training_gives_no_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a benchmark that is asked to end, as a run would, after a step."""
    noted = Quiet.log

    def log(self: Quiet, record: dict[str, Any]) -> None:
        noted(self, record)
        if self.steps == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Quiet, "log", log)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    small = ["model.d_model=32", "model.num_heads=4", "train.eval_sequences=4"]
    try:
        with pytest.raises(KeyboardInterrupt):
            main(["--seeds", "1", "--steps", "9", "--alphas", "0.001", *small])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
