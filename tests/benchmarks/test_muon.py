"""The benchmark of Muon: its tables; the document's is what it prints; a few steps from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.muon import (
    Found,
    Tail,
    Trained,
    best_lr,
    beyond,
    difference_of,
    main,
    table_of_tails,
    table_of_training,
    tails_of,
)
from benchmarks.newton_schulz_wire import BASE, OnTheWire, in_virtual_time, setting_of, table, variants
from megalina.cli.compare import job_of
from megalina.compare.ladder import LINK_MBIT

ROOT = Path(__file__).resolve().parents[2]
RUN = Trained("muon", 3e-3, 0, 3.0, 2_000_000, 1000.0)


def test_means_over_seeds_and_their_spread_are_shown() -> None:
    runs = [RUN, replace(RUN, seed=1, loss=3.5), replace(RUN, optimizer="adamw", state_bytes=4_000_000)]
    table = table_of_training(runs)
    assert "| muon | 0.003 | 3.2500 | 0.5000 | 2.0 | 1,000 |" in table and "| adamw | 0.003 | 3.0000 | 0.0000 | 4.0 |" in table
    assert "| Muon | 1 | 10.0 | 2.0 | 1.5 | 3.2 |" in table_of_tails([Tail("Muon", 1, 10.0, 2.0, 1.5, 3.2)])
    assert (table_of_training([]), table_of_tails([])) == ("", "")


def test_parts_that_are_none_and_bad_overrides_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "head"]) == 2
    assert "--parts head: head is none of train, tail" in capsys.readouterr().err
    assert main(["--parts", "train", "--seeds", "1", "--steps", "2", "model.num_heads=3"]) == 2
    assert "model.num_heads (3) must divide model.d_model" in capsys.readouterr().err


def test_each_optimizer_has_its_own_best_learning_rate_and_a_sweep_that_is_too_narrow_is_told() -> None:
    losses = {"adamw": [3.3, 3.1, 3.2], "muon": [3.0, 2.9, 2.8]}
    sweep = [
        replace(RUN, optimizer=name, lr=lr, loss=of[i]) for i, lr in enumerate((1.0, 2.0, 4.0)) for name, of in losses.items()
    ]
    sweep.append(replace(RUN, optimizer="adamw", lr=8.0, loss=float("nan")))
    assert (best_lr(sweep, "adamw"), best_lr(sweep[:-1], "muon")) == (2.0, 4.0)
    with pytest.raises(ValueError, match="adamw diverged with every learning rate"):
        best_lr(sweep[-1:], "adamw")
    assert (beyond(sweep, "adamw"), beyond(sweep[:-1], "muon"), beyond(sweep[:2], "muon")) == (None, 8.0, 0.5)
    runs = [replace(RUN, seed=1, loss=2.75), replace(RUN, seed=1, optimizer="adamw"), replace(RUN, seed=2, optimizer="adamw")]
    text = difference_of(Found(sweep[:-1], [*runs, replace(RUN, seed=2, loss=3.125)]))
    assert "seed by seed: -0.2500, +0.1250\nmuon is best at 4, the end of what was tried: give --lrs further from it" in text
    assert difference_of(Found(sweep)) == "" and "further" not in difference_of(Found([], [*runs, replace(RUN, seed=2)]))


def test_the_table_of_the_wire_has_medians_and_quartiles() -> None:
    assert table([]) == ""
    row = OnTheWire("Muon, at the end", 1, 1010.0, (1000.0, 1030.0), 170.0, (160.0, 190.0), 990.0, 150.0, 133.0, 0.012)
    text = table([row, replace(row, overrun=0.003)])
    assert "| Muon, at the end | 1 | 1010 | 1000 - 1030 | 170 | 160 - 190 | 990 | 150 | 133 |" in text
    assert "late by at most 1.2%" in text
    with pytest.raises(ValueError, match="--only 5x5: the ladder has 4x1 light"):
        setting_of("5x5", 1.0)


def test_under_tokens_the_tail_is_shorter_in_virtual_time_and_each_list_can_run() -> None:
    setting, named = setting_of("4x1 light", 3.0), variants()
    job = job_of(setting, tuple(named), variants=named, base=setting.all_overrides(), link_mbit=LINK_MBIT)
    assert list(job.configs) == list(named) and next(iter(named)) == BASE
    end, under = (
        in_virtual_time(job.configs[f"Muon, {when}"], 4, job.link_mbit) for when in ("at the end", "after 2 all-to-alls")
    )
    assert end[2] == under[2] > 0.9 and under[1] < 0.5 * end[1] and under[0] < end[0]


@pytest.mark.full
def test_the_documents_table_is_what_it_prints() -> None:
    found = table_of_tails([tail for zero in (0, 1) for tail in tails_of(zero)]).splitlines()[2:]
    printed = {line.rpartition(" | ")[0] + " |" for line in found}  # without peaks
    text = (ROOT / "docs" / "optimizers.md").read_text()
    told = [line for line in text.splitlines() if line.startswith(("| AdamW |", "| Muon, "))]
    assert len(told) == 7 and set(told) <= printed


@pytest.mark.full
def test_a_few_steps_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "muon.json"
    small = ["model.d_model=32", "model.num_heads=4", "train.eval_sequences=8", "train.seq_len=32", "data.vocab_size=512"]
    assert main(["--parts", "train", "--seeds", "1", "--steps", "3", "--lrs", "0.001,0.01", "--json", str(out), *small]) == 0
    found = json.loads(out.read_text())
    assert len(found["sweep"]) >= 4 and {run["seed"] for run in found["trained"]} == {1}
    runs = {run["optimizer"]: run for run in found["trained"]}
    assert all(run["lr"] == best_lr([Trained(**r) for r in found["sweep"]], name) for name, run in runs.items())
    assert set(runs) == {"adamw", "muon"} and runs["muon"]["state_bytes"] < runs["adamw"]["state_bytes"]
    assert all(0 < run["loss"] < 10 for run in runs.values())
    again = ["--parts", "train", "--seeds", "1", "--lrs", "0.001,0.01", "--known", str(out), *small]
    assert main([*again, "--steps", "3", "--json", str(tmp_path / "same.json")]) == 0  # nothing is trained again
    assert json.loads((tmp_path / "same.json").read_text()) == found
    assert main([*again, "--steps", "4"]) == 2
    assert "is of 3 steps" in capsys.readouterr().err
