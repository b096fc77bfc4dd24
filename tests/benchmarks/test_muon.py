"""The benchmark of Muon: its tables; the document's is what it prints; a few steps from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.muon import Tail, Trained, main, table_of_tails, table_of_training, tails_of

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


@pytest.mark.full
def test_the_documents_table_is_what_it_prints() -> None:
    found = table_of_tails([tail for zero in (0, 1) for tail in tails_of(zero)]).splitlines()[2:]
    printed = {line.rpartition(" | ")[0] + " |" for line in found}  # without peaks
    text = (ROOT / "docs" / "optimizers.md").read_text()
    told = [line for line in text.splitlines() if line.startswith(("| AdamW |", "| Muon, "))]
    assert len(told) == 7 and set(told) <= printed


@pytest.mark.full
def test_a_few_steps_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "muon.json"
    small = ["model.d_model=32", "model.num_heads=4", "train.eval_sequences=8", "train.seq_len=32", "data.vocab_size=512"]
    assert main(["--parts", "train", "--seeds", "1", "--steps", "3", "--json", str(out), *small]) == 0
    runs = {run["optimizer"]: run for run in json.loads(out.read_text())["trained"]}
    assert set(runs) == {"adamw", "muon"} and runs["muon"]["state_bytes"] < runs["adamw"]["state_bytes"]
    assert all(0 < run["loss"] < 10 for run in runs.values())
