"""Torch's pipelines as a peer: the same model on both sides, verdicts on its tables, gradients, times on equal terms; tiny."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import batch_of
from benchmarks.pipelining import torch_model
from benchmarks.pipelining.cells import walk_s
from benchmarks.pipelining.exact import gradients_of, in_a_pipeline, largest_error, small, tables_on_our_ranks, torchs_own_run
from benchmarks.pipelining.tables import KINDS, kind_of, said_of_all
from benchmarks.pipelining.torch_model import Stage, check_model, whole_model
from benchmarks.pipelining.torch_report import exact_table, summary_of, times_table
from benchmarks.pipelining.turns import LATE, OURS, TORCH
from benchmarks.torch_pipelines import EMULATED, main
from megalina.cli.compare import BAD_INPUT
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.launch import num_cores
from megalina.step.pipeline.stages import stages_from

RANKS, MICRO_BATCHES = 4, 8


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return compose(EMULATED)


def test_the_stages_are_the_model(config: PretrainConfig) -> None:
    """Four of them, a dense layer and MoE layers among them, in float64: loss and all gradients."""
    own = small(config, 2)
    batch = batch_of(2, own.train.seq_len, own.model.vocab_size, 0)
    gpt = whole_model(own, dtype=torch.float64, shaken=True)
    weights = dict(gpt.named_parameters())
    stages = [Stage(own, weights, layers) for layers in stages_from("Et|t|t|tL")]
    x = batch.tokens_BS
    for stage in stages:
        x = stage(x)
    loss = F.cross_entropy(x, batch.labels_BS.flatten(), reduction="sum")
    wanted = gpt(batch).loss
    loss.backward()
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-14)
    whole = {name: p.grad for name, p in weights.items() if p.grad is not None}
    found = [gradients_of(stage) for stage in stages]
    assert largest_error(whole, found) < 1e-12
    source, gradient = found[0][0]
    found[0][0] = source, 1.001 * gradient
    assert largest_error(whole, found) == pytest.approx(1e-3)
    assert largest_error(whole, found[1:]) == math.inf


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.shared_d_ff=64", "model.shared_d_ff=64: the stages for torch's pipelines have 0 alone"),
        ("model.qk_norm=head", "model.qk_norm=head: the stages for torch's pipelines have none alone"),
        ("router.balance_loss=0.01", r"router.balance_loss=0.01: the stages for torch's pipelines have 0.0 alone"),
        ("model.activation=relu", "model.activation=relu: the stages for torch's pipelines have swiglu and gelu"),
    ],
)
def test_what_torchs_stages_dont_have_is_refused(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_model(compose([*EMULATED, override]))


def test_what_the_check_says_of_torchs_tables() -> None:
    said = {kind.name: said_of_all(kind, RANKS, MICRO_BATCHES) for kind in KINDS}
    assert said["1F1B"] == {"cells": "rank 3 at position 14, 3F8: there are micro-batches 0 to 7"}
    for name in ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        assert said[name]["cells"] == said[name]["messages"] == "" != said[name]["late receives"], name
    unwaited = {name: said[name]["late receives, none waited for"] for name in said if name != "1F1B"}
    assert unwaited["Interleaved1F1B"] == unwaited["InterleavedZeroBubble"] == ""
    assert all("receives in another order" in unwaited[name] for name in ("ZBVZeroBubble", "DualPipeV"))


def test_cells_and_messages_alone_are_what_the_formula_says(config: PretrainConfig) -> None:
    """1F1B on four ranks with two layers each, no time for messages: m (F + B) + 3 (F + B)."""
    train = replace(config.train, global_batch_size=MICRO_BATCHES)
    piped = in_a_pipeline(replace(config, train=train), kind_of("1F1B"), RANKS, "1f1b")
    cells_s = 2 * 3 * 1.02 * (0.010 + 0.014)  # of a micro-batch on a rank, with the floor of 2%
    assert walk_s(piped, link_mbit=0) == pytest.approx((MICRO_BATCHES + 3) * cells_s)
    later = walk_s(piped, link_mbit=500)
    assert later is not None and later > (MICRO_BATCHES + 3) * cells_s
    assert walk_s(replace(piped, cluster=compose([]).cluster), link_mbit=0) is None


def measured(step_s: float, *, waits_s: float, losses: tuple[float, ...] = (3.0, 2.0)) -> dict[str, Any]:
    steps = [step_s, step_s, 2 * step_s, 2 * step_s]
    return {"step_s": steps, "waits_s": [waits_s] * 4, "busy_s": [1.0] * 4, "overrun_fraction": 0.01, "losses": list(losses)}


def test_torch_counts_with_the_better_of_its_two_ways(config: PretrainConfig) -> None:
    train = replace(config.train, global_batch_size=4 * MICRO_BATCHES)
    piped = in_a_pipeline(replace(config, train=train), kind_of("ZBVZeroBubble"), 2, "zbv")
    sides = {
        TORCH: measured(3.0, waits_s=0.6),
        LATE: measured(2.4, waits_s=0.5),
        OURS: measured(2.0, waits_s=0.2, losses=(3.0, 2.02)),
    }
    found = summary_of({"ZBVZeroBubble": sides}, {"ZBVZeroBubble": piped}, turn=2, link_mbit=0, slow_motion=2.0)
    row = found["ZBVZeroBubble"]
    assert (row["torch"], row["ratio"], row["spread"]) == (LATE, pytest.approx(1.2), [pytest.approx(1.2)] * 2)
    assert row["sides"][OURS]["median_step_s"] == pytest.approx(1.5) and row["sides"][LATE]["median_waits_s"] == 0.25  # own time
    assert row["largest_loss_difference"] == pytest.approx(0.0099, rel=0.01)
    text = times_table(found)
    assert "| ZBVZeroBubble | 1800 | 1500 | 1.200 | 1.200 - 1.200 | 250, 100 | 72.2%, 66.7% |" in text
    assert "overrun 1.0%." in text


def test_a_run_that_came_to_no_end_and_a_wrong_one_are_told() -> None:
    rows = {
        "1F1B": {TORCH: {"error": 1e-15, "exact": True, "said": ""}},
        "DualPipeV": {
            OURS: {"error": 2e-15, "exact": True, "said": ""},
            TORCH: {"error": 0.25, "exact": False, "said": ""},
            LATE: {"error": None, "exact": False, "said": "no answer from rank 0 of 2 after 60 s"},
        },
    }
    text = exact_table(rows)
    assert "| 1F1B | not run | not run | 1.0e-15 | not run |" in text
    assert "| DualPipeV | 2.0e-15 | not run | 2.5e-01 wrong | no end: no answer from rank 0 of 2 after 60 s |" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--only GPipe", "GPipe: choose of torch's schedules 1F1B, Interleaved1F1B"),
        ("--parts table", "--parts table: choose of tables, exact, times"),
        (f"--real-math --ranks {num_cores() + 1}", "ranks would wait for cores"),
        ("--real-math --slow-motion 2 --ranks 1", "--slow-motion 2 slows emulated devices"),
        ("model.no_such=1", "there is no setting model.no_such"),
    ],
)
def test_bad_input_is_one_line_before_a_rank_starts(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert main(arguments.split()) == BAD_INPUT
    out, err = capsys.readouterr()
    assert said in err and (out, err.count("\n")) == ("", 1)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
def test_legal_tables_are_exact_on_our_ranks_and_so_is_torchs_own_run(config: PretrainConfig, ranks: int, tmp_path: Path) -> None:
    legal = [kind for kind in KINDS if kind.name != "1F1B"]
    for messages in (False, True):
        of_tables = tables_on_our_ranks(config, legal, ranks, tmp_path, messages=messages)
        assert {name: outcome.said for name, outcome in of_tables.items()} == {kind.name: "" for kind in legal}
        assert all(outcome.exact for outcome in of_tables.values())
    for kind in KINDS:
        assert torchs_own_run(config, kind, ranks).exact, kind


def test_a_model_without_positions_is_another_one(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "rotate", lambda x, cos, sin: x)
    own = small(config, 2)
    weights = dict(whole_model(own, dtype=torch.float64, shaken=True).named_parameters())
    batch = batch_of(2, own.train.seq_len, own.model.vocab_size, 0)
    (stage,) = [Stage(own, weights, layers) for layers in stages_from("EttttL")]
    F.cross_entropy(stage(batch.tokens_BS), batch.labels_BS.flatten(), reduction="sum").backward()
    gpt = whole_model(own, dtype=torch.float64, shaken=True)
    gpt(batch).loss.backward()
    whole = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
    assert largest_error(whole, [gradients_of(stage)]) > 1e-6


@pytest.mark.full
def test_the_benchmark_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks without links; devices are as busy on both sides, and losses are the same."""
    words = [
        "--link-mbit",
        "0",
        "--ranks",
        "2",
        "--rounds",
        "2",
        "--steps",
        "1",
        "--only",
        "ZBVZeroBubble,1F1B",
        "--parts",
        "tables,times",
    ]
    files = ["--json", str(tmp_path / "found.json"), "--picture", str(tmp_path / "found.png")]
    small_model = ["model.num_layers=4", "model.d_model=32", "train.seq_len=16", "train.micro_batch_size=2"]
    assert main([*words, *files, *small_model, "cluster.attention_ms=3", "cluster.experts_ms=4"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["ranks"]["2"]
    assert found["tables"]["1F1B"]["cells"].startswith("rank 1 at position")
    for row in found["times"].values():
        assert set(row["sides"]) == {TORCH, OURS} and row["torch"] == TORCH
        assert row["largest_loss_difference"] < 1e-5 and row["ratio"] > 0
        torchs, ours = row["sides"][TORCH], row["sides"][OURS]
        assert torchs["busy_s"] == pytest.approx(ours["busy_s"]) and len(ours["step_s"]) == 2
        assert ours["median_step_s"] > row["walk_s"] * 0.999 and torchs["median_step_s"] > row["walk_s"] * 0.999
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 1F1B |" in capsys.readouterr().out
