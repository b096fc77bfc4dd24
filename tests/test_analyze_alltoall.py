"""tools/analyze_alltoall.py: bad input stops before any rank starts; a short run on two ranks."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalina import launch
from tests.train.small_run import write_tokens
from tools.analyze_alltoall import BAD_INPUT, main, settings_of

ROOT = Path(__file__).resolve().parent.parent
TWO = ["model=tiny", "launch.ranks=2", "launch.device=cpu", "parallel.ep=2"]


@pytest.fixture(autouse=True)
def no_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "run_ranks", lambda *_, **__: pytest.fail("a rank was started"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model=tiny"], "parallel.ep=1 gives no all-to-all: ranks must share the experts, as with launch.ranks=4 parallel.ep=4"),
        ([*TWO, "--experts", "3"], "--experts 3 on 2 rank(s) gives no all-to-all"),
        ([*TWO, "--experts", "1,2"], "--experts 1,2: a layer needs at least 2 experts"),
        ([*TWO, "--experts", "two"], "--experts two: give numbers with commas between, such as 2,4,8"),
        ([*TWO, "--json", "/nowhere/a.json"], "--json /nowhere/a.json: there is no folder /nowhere"),
        ([*TWO, "--plot", "a.gif"], "--plot a.gif: the name must end in .png or .svg"),
        ([*TWO, "--timeline", "a.pdf"], "--timeline a.pdf: the name must end in .png or .svg"),
        ([*TWO, "--trace", "a.txt"], "--trace a.txt: the name must end in .json or .json.gz"),
        ([*TWO, "model.num_expert=4"], "there is no setting model.num_expert (did you mean model.num_experts?); see --help"),
        ([*TWO, "model=tinny"], "model=tinny: there is no such file in conf/model"),
        ([*TWO, "router.top_k=99"], "router.top_k (99)"),
        ([*TWO, "data=indexed", "data.prefix=/nowhere/tokens"], "/nowhere/tokens"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == BAD_INPUT
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err


def test_each_number_of_experts_is_a_setting_over_as_many_ranks_as_divide_it() -> None:
    configs = settings_of(["model=tiny", "launch.ranks=4", "parallel.ep=4", "train.global_batch_size=32"], "2,4,8,6", 3, None)
    assert [(c.model.num_experts, c.parallel.ep) for c in configs] == [(2, 2), (4, 4), (8, 4), (6, 2)]


@pytest.mark.full
def test_two_ranks_are_measured(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    files = {
        "json": tmp_path / "a.json",
        "plot": tmp_path / "a.svg",
        "timeline": tmp_path / "t.png",
        "trace": tmp_path / "a.json.gz",
    }
    data = ["data=indexed", f"data.prefix={tmp_path}/tokens", f"data.cache_dir={tmp_path}/cache", "train.seq_len=16"]
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    tool = [sys.executable, str(ROOT / "tools" / "analyze_alltoall.py")]
    command = [*tool, *TWO, *data, "--experts", "2,4", "--steps", "2", *flags]
    quiet = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    (tmp_path / "here").mkdir()
    done = subprocess.run(command, cwd=tmp_path / "here", env=quiet, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "here").iterdir())  # nothing but what was asked for
    assert done.stdout.startswith("2 ranks, strategy eager, 2 steps\n") and "74.9%" in done.stdout
    found = json.loads(files["json"].read_text())["settings"]
    assert [(s["experts"], s["ep"], s["ranks"]) for s in found] == [(2, 2, 2), (4, 2, 2)]
    for s in found:
        assert 0 < s["a2a_share"] < 1 and 0 <= s["idle_share"] < 1 and s["layer_s"]["experts"] > 0
        assert len(s["slowdowns_under_grads"]) + len(s["slowdowns_clear"]) > 0
        assert s["overrun_fraction"] == 0  # devices are real
    assert files["plot"].read_text().startswith("<?xml") and files["timeline"].read_bytes().startswith(b"\x89PNG")
    lines = json.loads(gzip.decompress(files["trace"].read_bytes()))["traceEvents"]
    assert {x["pid"] for x in lines} == {0, 1}
