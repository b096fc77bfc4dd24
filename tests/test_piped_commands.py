"""tools/simulate.py and tools/plan.py with pipelines, as a user runs them."""

import gzip
import json
from pathlib import Path

import pytest

from megalina.cli.plan import main as plan
from megalina.cli.simulate import main as simulate
from tests.commands import done

SMALL = (
    *("model=bench", "model.num_layers=4", "cluster=h100_400g", "train.dtype=bfloat16", "train.seq_len=512"),
    *("train.micro_batch_size=1", "train.global_batch_size=64", "parallel.ep=4", "parallel.pp=2", "strategy.pipeline=zb_h1"),
)


def test_a_simulated_pipeline_has_a_row_a_picture_and_a_trace_of_every_rank(tmp_path: Path) -> None:
    trace, picture, out = (tmp_path / name for name in ("step.json.gz", "cells.png", "row.json"))
    files = (f"simulate.trace={trace}", f"simulate.picture={picture}", f"simulate.json={out}")
    ran = done(simulate, *SMALL, "cluster.nodes=1", *files)
    assert ran.returncode == 0, ran.stderr
    assert "zb_h1, 2 pipeline ranks, 1 chunks each" in ran.stdout and "waits for messages ms" in ran.stdout
    assert "memory of the rank that holds the most" in ran.stdout
    row = json.loads(out.read_text())
    assert len(row["pipeline_ranks"]) == 2 and row["memory_bytes"] == max(r["memory_bytes"] for r in row["pipeline_ranks"])
    for rank in row["pipeline_ranks"]:
        assert rank["compute_s"] + sum(rank["exposed_s"].values()) == pytest.approx(row["step_s"])
        assert rank["idle_s"] == pytest.approx(row["step_s"] - rank["compute_s"])
    assert picture.stat().st_size > 10_000
    names = [
        e["args"]["name"] for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if e["name"] == "process_name"
    ]
    assert names == ["pipeline rank 0 (simulated)", "pipeline rank 1 (simulated)"]


def test_ranks_of_a_pipeline_that_differ_are_refused() -> None:
    ran = done(simulate, *SMALL, "cluster.nodes=1", "simulate.slow_rank=1", "simulate.slow_factor=2")
    assert ran.returncode == 2 and "parallel.pp=2" in ran.stderr and "simulate.slow_rank" in ran.stderr


@pytest.mark.full
def test_a_planned_pipeline_is_told_rank_by_rank_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "cells.png"
    assert plan([*SMALL, "nodes=1", "--json", str(out), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    for piece in ("pp 2 x edp 1 x ep 4", "zb_h1, 2 pipeline ranks", "waits for messages ms", "tokens a day"):
        assert piece in text
    found = json.loads(out.read_text())["candidates"]
    assert {"eager", "ddp", "lina_nopack"} <= {c["strategy"] for c in found}
    assert {"parallel.pp=2", "parallel.pp_chunks=1", "strategy.pipeline=zb_h1"} <= set(found[0]["overrides"])
    command = next(line for line in text.splitlines() if line.startswith("python pretrain_gpt_moe.py "))
    assert command.split()[2:] == found[0]["overrides"] and picture.stat().st_size > 10_000
