"""tools/plan.py as a user runs it: one layout, a search, and mistakes in one line."""

import json
from pathlib import Path

import pytest

from tools.plan import main

SMALL = ["model=bench", "cluster=h100_400g", "nodes=1", "train.seq_len=512"]
LAYOUT = [*SMALL, "parallel.ep=4", "train.global_batch_size=32", "train.dtype=bfloat16"]


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


def test_a_search_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main([*SMALL, "--search", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("chosen, since nothing else was asked for: train.global_batch_size=1024 train.dtype=bfloat16")
    assert len(json.loads(out.read_text())["candidates"]) > 100 and "candidates fit" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=h100_400", "nodes=1"], "h100_400"),
        (["cluster=local", "nodes=2"], "conf/cluster/local.yaml"),
        ([*LAYOUT, "parallel.ep=3"], "parallel.ep (3)"),
        ([*LAYOUT, "train.global_batch_size=9"], "train.global_batch_size (9)"),
        ([*LAYOUT, "cluster.hardware.memory_gib=-1"], "memory_gib"),
        ([*LAYOUT, "--json", "nowhere/plan.json"], "there is no folder"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    caught = capsys.readouterr()
    assert said in caught.err and caught.err.count("\n") <= 2 and not caught.out
