"""The tool: its rows, its words, its exit codes."""

import json
import multiprocessing
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest

from megalina.cli import verify as verify_layouts
from megalina.compose import CONF
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.verify import layouts, verification
from megalina.verify.layouts import Choices, Row
from megalina.verify.recording import Layout
from megalina.verify.verification import Result, common_cause


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows in place of all."""

    def rows(choices: Choices, ranks: int, mode: str) -> tuple[list[Row], str]:
        router, model, optimizer = next(iter(choices.routers)), next(iter(choices.models)), next(iter(choices.optimizers))
        some = [Layout(1), Layout(2, 1, 2, zero=1), Layout(2, 2, sequence=False, micro_batch=1)]
        return [Row(layout, router, 0.0, model, optimizer) for layout in some], f"{mode}: {ranks} ranks"

    monkeypatch.setattr(layouts, "chosen_rows", rows)


@pytest.mark.full
@pytest.mark.usefixtures("few")
def test_equal_rows_end_with_exit_code_0_and_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    overrides = ["model=tiny", "router=sigmoid"]
    assert verify_layouts.main([*overrides, "--ranks", "2", "--pairs", "model.bias=true", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("always: 2 ranks\n")
    assert out.count("  equal  ") == 3
    assert "3 rows: all equal to one process, largest error " in out.splitlines()[-1]
    assert multiprocessing.active_children() == []
    assert forkserver._forkserver._forkserver_pid is None  # type: ignore[attr-defined]
    found = json.loads(file.read_text())
    assert list(found) == ["rows"]
    row = found["rows"][1]
    assert row["layout"] == {
        "world": 2, "tp": 1, "ep": 2, "sequence": True, "zero": 1, "micro_batch": 2, "recompute": "none", "piece_mb": 0.0,
        "strategy": "eager", "cp": 1, "cp_kind": "all_gather", "pp": 1, "chunks": 1, "pipeline": "1f1b", "stages": "",
        "dispatch": "rows",
    }  # fmt: skip
    assert (row["router"], row["strategy"], row["equal"], row["first_difference"]) == ("sigmoid", "eager", True, None)
    assert 0 < row["largest_error"] < 1e-12
    assert row["seconds"] > 0


@pytest.mark.full
def test_a_planted_bug_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert verify_layouts.main(["--ranks", "1", "--plant", "last_micro_batch_dropped", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["named"] == "last_micro_batch_dropped"
    assert 1 <= len(found["rows"]) <= 6
    assert {row["named"] for row in found["rows"]} == {"last_micro_batch_dropped"}
    assert all(row["first_difference"].startswith("step 0: gradient") for row in found["rows"])
    out = capsys.readouterr().out
    assert f"{len(found['rows'])} differ from one process, 0 failed" in out.splitlines()[-1]
    assert "\nlast_micro_batch_dropped: " in out


@pytest.mark.full
@pytest.mark.parametrize(
    "plant",
    ["message_swapped", "weights_cell_left_out", "divided_by_micro_batches", "norm_of_own_stage", "embedding_summed_by_stages",
     "balance_of_first_stages_unseeded", "zigzag_undone_wrongly", "mask_of_another_piece"],
)  # fmt: skip
def test_a_planted_bug_of_pipelines_and_cut_sequences_is_found_and_named(
    plant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert verify_layouts.main(["model=tiny", "--ranks", "4", "--plant", plant, "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["named"] == plant and not any(row["equal"] or row["failed"] for row in found["rows"])
    if plant not in ("zigzag_undone_wrongly", "mask_of_another_piece"):
        assert len({row["layout"]["pipeline"] for row in found["rows"]}) > 1
        assert {row["layout"]["pp"] for row in found["rows"]} <= {2, 4}
    assert f"\n{plant}: " in capsys.readouterr().out


@pytest.mark.full
def test_pipelines_of_all_schedules_are_verified(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["model=tiny", "strategy.pipeline=docs/examples/own_pipeline.py:SCHEDULE", "--ranks", "2", "--json", str(file)]
    only = ["--only", "router=topk", "--only", "strategy=eager"]
    assert verify_layouts.main([*words, *only, "--pairs", "always"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["layout"]["pipeline"] for row in rows} == {*SCHEDULES, "docs/examples/own_pipeline.py:SCHEDULE"}
    assert {row["layout"]["pp"] for row in rows} == {1, 2}
    assert verify_layouts.main([*words, *only, "--only", "schedule=zbv", "--pairs", "always"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(row["layout"]["pp"], row["layout"]["pipeline"], row["layout"]["chunks"]) for row in rows} == {(2, "zbv", 2)}


def test_the_plants_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_layouts.main(["--list-plants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 20
    assert any(line.startswith("experts_scaled_by_edp ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model=laptp"], "model=laptp: there is no such file in conf/model (did you mean laptop?); there are "),
        (["model.dropuot=0.1"], "there is no setting model.dropuot (did you mean model.dropout?); see --help"),
        (["router.top_k=99"], "router.top_k (99) is more than model.num_experts (4): lower it or add experts"),
        (["router.group=global", "router.capacity_factor=1"], "router.group=global works for the balance loss alone: "),
        (["--pairs", "some"], "--pairs some: choose one of auto, always, never"),
        (["--plant", "norm_per_ranc"], "--plant norm_per_ranc: there is no such bug (did you mean norm_per_rank?)"),
        pytest.param(
            ["--plant", "norm_per_rank", "--ranks", "1"],
            "--plant norm_per_rank changes nothing in any layout of up to 1 ranks",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["strategy.pipeline=docs/examples/own_pipeline.py:SCHEDULE", "--ranks", "1"],
            "strategy.pipeline=docs/examples/own_pipeline.py:SCHEDULE is made for none of the rows, which have up to 1 ranks",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["strategy.pipeline=zbx"],
            "strategy.pipeline=zbx: there is no such schedule: choose one of gpipe, ",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["strategy.pipeline=nowhere.csv"], "strategy.pipeline=nowhere.csv: there is no such file", marks=pytest.mark.full
        ),
        (["launch.device=cuda"], "launch.device=cuda, but torch sees no GPU"),
        (["--json", "nowhere/rows.json"], "--json nowhere/rows.json: there is no folder "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert verify_layouts.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(line)


@pytest.mark.full
def test_every_router_and_strategy_is_there_and_the_users_own_first() -> None:
    files = {path.stem for path in (CONF / "router").glob("*.yaml")} - {verify_layouts.AS_MODEL}
    plain = verify_layouts.choices_of(["model=laptop"], 4)
    assert set(plain.routers) == files
    assert next(iter(plain.routers)) == "topk"
    own = verify_layouts.choices_of(["model=laptop", "router=sigmoid", "router.z_loss=0.5", "parallel.tp=64"], 4)
    assert set(own.routers) == files | {"yours"}
    assert next(iter(own.routers)) == "yours"
    assert (own.routers["yours"].kind, own.routers["yours"].z_loss) == ("sigmoid", 0.5)
    assert own.routers["sigmoid"] == plain.routers["sigmoid"]
    in_files = {path.stem for path in (CONF / "strategy").glob("*.yaml")}
    assert set(own.strategies) == in_files - {"auto"}  # which is one of the others, whichever is fastest


def result(named: str = "", *, candidates: tuple[str, ...] = (), error: float = 1.0, failed: str = "") -> Result:
    row = Row(Layout(), "topk", 0.0, "tiny", "adamw")
    return Result(row, not (named or failed), "here", error, error, 1.0, failed, named, f"because of {named}", candidates)


def test_the_cause_of_all_is_the_one_that_explains_every_row() -> None:
    assert common_cause([result(), result()]) == ""
    assert common_cause([result("a", candidates=("a", "b")), result("b", candidates=("b", "c")), result()]) == "b"
    assert common_cause([result("a", candidates=("a", "b")), result("a", candidates=("a", "b"))]) == "a"
    assert common_cause([result("a"), result("b")]) == verification.UNKNOWN
    assert common_cause([result("a"), result(failed="rank 1 died")]) == verification.UNKNOWN


def test_a_failed_row_is_shown_with_its_message_and_is_valid_json() -> None:
    failed = result(failed="rank 1 of 2: ValueError: no\nTraceback", error=float("inf"))
    results = [result(error=1e-14), failed, replace(result("a"), largest_error=0.5)]
    assert verify_layouts.closing_line(results).strip() == "3 rows: 1 differ from one process, 1 failed; 3 s"
    assert any("ValueError: no\nTraceback" in line for line in verify_layouts.findings(results))
    rows = json.loads(json.dumps(verify_layouts.as_json(results, planted=False), allow_nan=False))["rows"]
    assert [r["largest_error"] for r in rows] == [1e-14, None, 0.5]
    assert [r["failed"] is None for r in rows] == [True, False, True]


@pytest.mark.full
def test_only_some_rows_are_run() -> None:
    every = layouts.only(verify_layouts.choices_of(["model=tiny"], 2), ["router=hash,topk"])
    some = layouts.only(every, ["strategy=flow,lina", "router=hash"])
    assert (list(some.strategies), list(some.routers)) == (["flow", "lina"], ["hash"])
    rows, how = layouts.chosen_rows(some, 2, "always")
    assert rows and {row.layout.strategy for row in rows} == {"flow", "lina"} and {row.router for row in rows} == {"hash"}
    assert len(rows) < len(layouts.chosen_rows(every, 2, "always")[0]) and f"{len(rows)} rows" in how
    assert layouts.only(every, []) == every
    for word, said in (
        ("strategy=mine", "there is no strategy 'mine'; there are eager, "),
        ("router=", "there is no router ''; there are "),
        ("schedule=zb", "there is no schedule 'zb'; there are none, gpipe, "),
        ("zero=1", "give strategy=A,B or router=A,B or schedule=A,B"),
    ):
        with pytest.raises(ValueError, match=f"^--only {word}: {said}"):
            layouts.only(every, [word])
