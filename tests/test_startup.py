"""A start is quick: what takes seconds to import is imported where it is used.  Seconds alone would not say what came back."""

import json
import os
import pty
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megalina.compose import compose
from tests.train.small_run import write_tokens

ROOT = Path(__file__).resolve().parent.parent
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
HEAVY = ("torch", "matplotlib", "wandb", "tensorboard", "sentencepiece", "pyarrow", "pandas", "sympy", "transformers")
# Runs a script as a user would, then says in its last line on stderr which of these modules were imported.
PROBE = """
import atexit, json, runpy, sys
names = json.loads(sys.argv[1])
atexit.register(lambda: print(json.dumps([name for name in names if name in sys.modules]), file=sys.stderr))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# A rank of one process, until its first step is to begin.
RANK = """
import json, sys
from pathlib import Path
from megalina.train import trainer
from megalina.train.step_runner import StepRunner
from megalina.worker import load_config
names = json.loads(sys.argv[1])
def said(when):
    print(json.dumps([when, [name for name in names if name in sys.modules]]))
def first_step(self, *arguments, **named):
    said("first step")
    raise SystemExit(0)
said("imported")
StepRunner.compute = first_step
trainer.train(load_config(Path(sys.argv[2]).read_text()))
"""


def imported_by(folder: Path, *command: str, code: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(HEAVY), *command], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    return list(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("script", ["pretrain_gpt_moe.py", *(f"tools/{name}.py" for name in TOOLS)])
def test_help_needs_nothing_that_is_slow_to_import(tmp_path: Path, script: str) -> None:
    assert imported_by(tmp_path, str(ROOT / script), "--help", code=0) == []


@pytest.mark.parametrize(
    "command",
    [
        ("pretrain_gpt_moe.py", "optim.lrr=1"),
        pytest.param(("pretrain_gpt_moe.py", "parallel.ep=3"), marks=pytest.mark.full),
        pytest.param(("pretrain_gpt_moe.py", "train.init_from=nothing"), marks=pytest.mark.full),
        ("pretrain_gpt_moe.py", "launch.dry_run=true", "launch.ranks=3"),
        pytest.param(("tools/plan.py", "optim.lrr=1"), marks=pytest.mark.full),
        pytest.param(("tools/simulate.py", "optim.lrr=1"), marks=pytest.mark.full),
        pytest.param(("tools/compare_strategies.py", "optim.lrr=1", "--nodes", "1"), marks=pytest.mark.full),
        pytest.param(("tools/verify_layouts.py", "optim.lrr=1"), marks=pytest.mark.full),
        pytest.param(("tools/analyze_alltoall.py", "optim.lrr=1"), marks=pytest.mark.full),
        pytest.param(("tools/draw_strategies.py", "optim.lrr=1", "--out", "."), marks=pytest.mark.full),
        ("tools/evaluate_gpt_moe.py", "nothing"),
        ("tools/generate.py", "nothing"),
        ("tools/checkpoint.py", "inspect", "nothing"),
        ("tools/write_report.py", "nothing"),
    ],
    ids=" ".join,
)
def test_a_mistake_needs_nothing_that_is_slow_to_import(tmp_path: Path, command: tuple[str, ...]) -> None:
    script, *arguments = command
    assert imported_by(tmp_path, str(ROOT / script), *arguments, code=2) == []


@pytest.mark.full
def test_a_rank_is_ready_without_what_it_may_never_need(tmp_path: Path) -> None:
    """Checkpoints' format (DTensor, sympy), figures and torch's compiler: seconds, together as many as torch itself."""
    write_tokens(tmp_path / "tokens")
    data = ["data=indexed", f"data.prefix={tmp_path}/tokens", f"data.cache_dir={tmp_path}/cache", "train.seq_len=16"]
    config = compose([*data, f"run.dir={tmp_path}/run", "tracker.wandb.mode=disabled", "tracker.tensorboard=false"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    names = json.dumps(["torch.distributed.checkpoint", "matplotlib", "torch._dynamo", "wandb", "sympy", "tensorboard"])
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", RANK, names, str(tmp_path / "run" / "config.yaml")],
        env={**os.environ, **one},
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert said == [["imported", []], ["first step", []]], done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6  # generous: 1.7 on an idle machine


@pytest.mark.full
def test_a_terminal_shows_what_goes_on_before_the_first_step(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    data = ["data=indexed", f"data.prefix={tmp_path}/tokens", f"data.cache_dir={tmp_path}/cache", "train.seq_len=16"]
    ranks = ["launch.ranks=2", "parallel.ep=2", "train.steps=2", "tracker=minimal", f"run.dir={tmp_path}/run"]
    ours, theirs = pty.openpty()
    began_s = time.monotonic()
    with subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain_gpt_moe.py"), *data, *ranks], stdout=theirs, stderr=theirs, cwd=tmp_path
    ) as process:
        os.close(theirs)
        first_s, shown = 0.0, ""
        with suppress(OSError):  # how Linux says that the other end is closed
            while chunk := os.read(ours, 4096):
                first_s = first_s or time.monotonic() - began_s
                shown += chunk.decode()
    os.close(ours)
    assert process.returncode == 0, shown
    stages = [
        "checking the configuration",
        "starting 2 rank(s)",
        "waiting for 2 ranks",
        "building the model",
        "data: ",
        "step 2/2",
    ]
    places = [shown.find(stage) for stage in stages]
    assert -1 not in places and places == sorted(places), shown
    assert first_s < 3  # generous: 0.7 on an idle machine
