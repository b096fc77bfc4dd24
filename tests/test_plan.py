"""tools/plan.py as a user runs it: one layout, a search, and mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalina.cli.plan import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["model=bench", "cluster=h100_400g", "nodes=1", "train.seq_len=512"]
LAYOUT = [*SMALL, "parallel.ep=4", "train.global_batch_size=32", "train.dtype=bfloat16"]


@pytest.mark.full
def test_one_layout_under_every_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main([*LAYOUT, "--json", str(out), "--tokens", "1e9", "--picture", str(tmp_path / "step.png")]) == 0
    text = capsys.readouterr().out
    for piece in (
        "8 ranks = edp 2 x ep 4 x tp 1",
        "memory of a rank",
        "  peak ",
        "flow: 2 parts",
        "days for 1,000,000,000 tokens",
    ):
        assert piece in text
    assert (tmp_path / "step.png").stat().st_size > 10_000
    found = json.loads(out.read_text())
    times = [c["step_s"] for c in found["candidates"]]
    assert found["world"] == 8 and times == sorted(times)
    for c in found["candidates"]:
        assert c["fits"] and c["memory_bytes"] == sum(c["memory"].values()) <= c["memory_limit_bytes"]
    command = next(line for line in text.splitlines() if line.startswith("python pretrain_gpt_moe.py "))
    assert command.split()[2:] == found["candidates"][0]["overrides"]


@pytest.mark.full
def test_a_search_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    node = ["cluster.ranks_per_node=4", "cluster.hardware.domain_ranks=4", "cluster.hardware.nics_per_node=4"]
    small = ["model.num_layers=2", "model.num_experts=2", "model.num_heads=1", "model.num_kv_heads=1"]
    assert main([*SMALL, *small, *node, "--search", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("chosen, since nothing else was asked for: train.global_batch_size=1024 train.dtype=bfloat16")
    found = json.loads(out.read_text())["candidates"]
    assert len(found) > 25 and "candidates fit" in text
    assert {"overrides", "fits", "memory_bytes", "step_s", "mfu", "strategy"} <= set(found[0])
    accepted_as_it_is_printed(text, tmp_path)


def accepted_as_it_is_printed(text: str, folder: Path) -> None:
    """The last line, pasted."""
    words = text.splitlines()[-1].split()
    assert words[:2] == ["python", "pretrain_gpt_moe.py"]
    command = [sys.executable, str(ROOT / words[1]), *words[2:], "launch.dry_run=true"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told = next(line for line in text.splitlines() if line.startswith("strategy   "))
    assert told in done.stdout.splitlines() and not [path for path in folder.iterdir() if path.suffix != ".json"]


def test_all_that_is_told_of_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYOUT, "--loads", "1,3"]) == 0
    text = capsys.readouterr().out
    for piece in (
        "FLOPs      ",
        "parameters ",
        "  ep       2 x 4 ranks: [0 1 2 3] [4 5 6 7]",
        "rows of the busiest rank over the mean",
        "peak, recompute selective",
        "an all-to-all's rows, sent and received",
        "timeline of ",
        "  gradients |",
        "tokens a day",
    ):
        assert piece in text


def test_a_layout_that_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYOUT, "cluster.hardware.memory_gib=4.3"]) == 0
    text = capsys.readouterr().out
    assert "none of " in text and "python pretrain_gpt_moe.py" not in text and " too much" in text
    words = next(line for line in text.splitlines() if line.startswith("fits with ")).partition(" (else")[0].split()[2:]
    assert main([*LAYOUT, "cluster.hardware.memory_gib=4.3", *words, "--loads", "1"]) == 0
    assert "python pretrain_gpt_moe.py" in capsys.readouterr().out


def test_a_model_that_fits_nowhere_is_told_what_a_rank_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYOUT, "cluster.hardware.memory_gib=0.5", "--loads", "1"]) == 0
    text = capsys.readouterr().out
    assert "nothing up to 64 times as many nodes fits; " in text and "raise parallel.pp" in text


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=gpt_oss_20b", "nodes=1"], "18 of 334 candidates fit"),
        (
            ["model=deepseek_v3", "nodes=32"],
            "fits with nodes=64 train.global_batch_size=2048 parallel.ep=8 (else as parallel.pp=32",
        ),
    ],
)
def test_published_models_are_planned(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/models.md has it."""
    assert main([*words, "cluster=h100_400g", "train.seq_len=4096", "--search"]) == 0
    text = capsys.readouterr().out
    assert said in text and "master weights" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=h100_400", "nodes=1"], "h100_400"),
        (["cluster=local", "nodes=2"], "conf/cluster/local.yaml"),
        ([*LAYOUT, "parallel.ep=3"], "parallel.ep (3)"),
        ([*LAYOUT, "train.global_batch_size=9"], "train.global_batch_size (9)"),
        ([*LAYOUT, "cluster.hardware.memory_gib=-1"], "memory_gib"),
        ([*LAYOUT, "cluster.hardware.memory_gbyte_s=0"], "memory_gbyte_s is 0"),
        ([*LAYOUT, "cluster.link_gbit=-5"], "link_gbit is -5"),
        ([*LAYOUT, "nodes=-1"], "nodes"),
        ([*LAYOUT, "nodes=0"], "nodes"),
        ([*LAYOUT, "--json", "nowhere/plan.json"], "there is no folder"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    caught = capsys.readouterr()
    assert said in caught.err and caught.err.count("\n") <= 2 and not caught.out


@pytest.mark.parametrize("text", ["0.5", "1,x", "", "1,inf"])
def test_loads_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*LAYOUT, "--loads", text])
    assert "must be numbers from 1, for even routing, to 1,000,000" in capsys.readouterr().err
