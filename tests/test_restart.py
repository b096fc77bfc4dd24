"""After a lost rank the job goes on from its own newest checkpoint, whatever its first start was told."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalina.checkpoint.checksums import METADATA, SUMS, VALUES
from megalina.cli.train import next_command
from megalina.config import PretrainConfig, RunConfig
from megalina.launch import later_starts


def save(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name in (VALUES, METADATA, SUMS) if complete else (VALUES,):
        (path / name).touch()
    return path


@pytest.mark.parametrize("resume", ["auto", "verify", "none"])
def test_the_newest_checkpoint_is_taken(tmp_path: Path, resume: str) -> None:
    next_start = later_starts(tmp_path, resume)
    assert next_start() == ("auto", "from the beginning, without a checkpoint")
    save(tmp_path, 10)
    save(tmp_path, 20)
    save(tmp_path, 30, complete=False)
    assert next_start() == ("auto", "from checkpoint step_00000020")


def test_a_start_from_another_path_is_repeated_until_there_is_a_checkpoint(tmp_path: Path) -> None:
    next_start = later_starts(tmp_path / "checkpoints", "/other/step_00000005")
    assert next_start()[0] == "/other/step_00000005"
    save(tmp_path / "checkpoints", 10)
    assert next_start()[0] == "auto"


def test_checkpoints_from_before_the_job_are_not_its_own(tmp_path: Path) -> None:
    for step in (50, 100):
        save(tmp_path, step)
    back = str(tmp_path / "step_00000050")  # the user went back
    next_start = later_starts(tmp_path, back)
    assert next_start()[0] == back
    own = save(tmp_path, 60)
    assert next_start()[0] == str(own)
    save(tmp_path, 110)
    assert next_start()[0] == "auto"


def test_a_lost_job_ends_with_the_command_that_goes_on() -> None:
    overrides = ["experiment=laptop", "train.resume=none", "run.dir=x", "data.skip_samples=[[1, 2]]"]
    config = replace(PretrainConfig(), run=RunConfig(dir="runs/2026-12-01_10-00-00"))
    start = "python pretrain_gpt_moe.py experiment=laptop 'data.skip_samples=[[1, 2]]' run.dir=runs/2026-12-01_10-00-00"
    assert next_command(config, overrides, "auto") == start
    assert next_command(config, overrides, "a b/step_00000010") == f"{start} 'train.resume=a b/step_00000010'"
