"""A run goes on from the newest checkpoint that is good, says which it passed over, and never starts anew in silence."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.checksums import SUMS
from megalina.checkpoint.files import newest_checkpoint, read_values
from megalina.config import PretrainConfig
from megalina.data.source import open_data
from megalina.train.resume import agreed_resume_point, check_settings, check_start, resume_candidates, resume_point, with_weights
from megalina.train.trainer import Trainer
from tests.checkpoint.planted import flip
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import Recorder, checkpoint, config_of, records_of, write_tokens

RUN: dict[str, Any] = {"steps": 6, "interval": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder of a finished run, and its losses."""
    folder = tmp_path_factory.mktemp("runs")
    write_tokens(folder / "tokens")
    return folder, records_of(config_of(folder, "whole", **RUN)).of("loss")


@pytest.fixture
def run(made: tuple[Path, list[float]], tmp_path: Path) -> PretrainConfig:
    """A copy of that run, to be spoiled."""
    folder, _ = made
    (tmp_path / "tokens.idx").symlink_to(folder / "tokens.idx")
    (tmp_path / "tokens.bin").symlink_to(folder / "tokens.bin")
    shutil.copytree(folder / "whole", tmp_path / "whole")
    config = config_of(tmp_path, "whole", **RUN)
    config.data.prefix = str(folder / "tokens")  # else it is another run
    return config


def go_on(config: PretrainConfig) -> Recorder:
    """As `train` begins, without trackers."""
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    run = Trainer(config, data, device=torch.device("cpu"), tracker=Recorder())  # type: ignore[arg-type]
    run.begin(agreed_resume_point(config, run.state.checkpoints))
    run.loop()
    assert isinstance(run.tracker, Recorder)
    return run.tracker


def spoil(config: PretrainConfig, step: int, name: str, place: int = 100) -> None:
    flip(checkpoint(config, step) / name, place)


def test_damaged_small_files_are_passed_over_before_ranks_start(run: PretrainConfig) -> None:
    assert resume_point(run) == checkpoint(run, 6)
    spoil(run, 6, "values.json")
    assert resume_point(run) == checkpoint(run, 4)
    spoil(run, 4, ".metadata")
    check_start(run, vocab_size=300)
    assert resume_point(run) == checkpoint(run, 2) and newest_checkpoint(checkpoint(run, 2).parent) == checkpoint(run, 6)
    data = checkpoint(run, 2) / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    for find in (resume_point, lambda config: check_start(config, vocab_size=300)):
        with pytest.raises(
            ValueError, match=r"all 3 checkpoints are damaged.*00006: values.json.*00004: .metadata.*00002: __0_0.* bytes"
        ):
            find(run)


def test_a_damaged_tensor_file_takes_the_run_one_checkpoint_back(
    run: PretrainConfig, made: tuple[Path, list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(run, 6, "__0_0.distcp", 5000)
    assert resume_point(run) == checkpoint(run, 6)  # one process alone doesn't read it
    with caplog.at_level(logging.WARNING, "megalina"):
        assert go_on(run).of("loss") == made[1][4:]
    assert "step_00000006 is damaged and passed over for step_00000004: __0_0.distcp: its checksum" in caplog.text
    there = sorted(p.name for p in checkpoint(run, 6).parent.iterdir())
    assert there == ["step_00000002", "step_00000004", "step_00000006", "step_00000006.damaged"]
    assert resume_point(run) == checkpoint(run, 6) and not go_on(run).records  # the new one of that step is good


def on_two_ranks(config: PretrainConfig) -> list[float]:
    return go_on(config).of("loss")


@pytest.mark.full
def test_ranks_fall_back_together_in_another_layout(run: PretrainConfig, made: tuple[Path, list[float]]) -> None:
    spoil(run, 6, SUMS, 10)
    spoil(run, 4, "__0_0.distcp", 5000)
    run.parallel.ep = 2
    first, second = run_on_ranks(2, on_two_ranks, run)
    assert first == second and len(first) == 4
    assert max(abs(a - b) for a, b in zip(first, made[1][2:], strict=True)) < 1e-4


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(run: PretrainConfig) -> None:
    for step in (2, 4, 6):
        spoil(run, step, "__0_0.distcp", 5000)
    with pytest.raises(ValueError, match=r"all 3 checkpoints are damaged"):
        go_on(run)
    assert len(resume_candidates(run)) == 3
    run.train.resume = "none"
    with pytest.raises(ValueError, match="resume=none, but .* has a checkpoint of step 6"):
        go_on(run)


@pytest.mark.parametrize("setting", ["resume", "init_from"])
def test_a_checkpoint_that_is_named_and_damaged_is_an_error(run: PretrainConfig, tmp_path: Path, setting: str) -> None:
    spoil(run, 6, "__0_0.distcp", 5000)
    branch = config_of(tmp_path, "branch", **RUN, **{setting: str(checkpoint(run, 6))})
    branch.data.prefix = run.data.prefix
    with pytest.raises(ValueError, match=r"step_00000006: __0_0.distcp: its checksum .* choose another one"):
        go_on(branch)
    assert checkpoint(run, 6).exists()  # nor is it moved
    spoil(run, 6, "values.json")
    with pytest.raises(ValueError, match=r"values.json"):
        check_start(branch, vocab_size=300)


def test_one_without_checksums_is_incomplete_and_named(run: PretrainConfig) -> None:
    for step in (2, 4, 6):
        (checkpoint(run, step) / SUMS).unlink()
    with pytest.raises(ValueError, match=r"damaged or incomplete .*step_00000006: SHA256SUMS: there is no such file"):
        resume_point(run)


def test_what_has_changed_is_in_the_log_and_in_the_first_record(run: PretrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    run.data.cache_dir = read_values(checkpoint(run, 6))["config"]["data"]["cache_dir"]
    run.optim.lr, run.train.steps = 3e-4, 8
    with caplog.at_level(logging.INFO, "megalina"):
        first, second = go_on(run).records
    assert "changed since step 6: optim.lr 0.003 -> 0.0003, train.steps 6 -> 8" in caplog.messages
    assert first["changed_settings"] == {"optim.lr": [3e-3, 3e-4], "train.steps": [6, 8]}
    assert "changed_settings" not in second
    caplog.clear()
    run.train.steps = 9
    with caplog.at_level(logging.INFO, "megalina"):
        assert go_on(run).records[0]["changed_settings"] == {"train.steps": [8, 9]}  # against the newest checkpoint


def test_a_run_does_not_go_on_with_another_seed_or_number_type(run: PretrainConfig) -> None:
    run.train.seed, run.train.steps = 5, 8
    for find in (resume_point, check_settings, go_on):
        with pytest.raises(ValueError, match="is of another run: train.seed 1234 -> 5: .*train.allow_changes=true"):
            find(run)
    run.train.dtype = "bfloat16"
    for find in (resume_point, check_settings, go_on):
        with pytest.raises(ValueError, match="number type: train.dtype float32 -> bfloat16: .*train.init_from="):
            find(run)
    run.train.dtype, run.train.allow_changes = "float32", True
    assert len(go_on(run).records) == 2


@pytest.mark.parametrize("setting", ["resume", "init_from"])
def test_another_model_is_named_by_its_settings_without_data(run: PretrainConfig, tmp_path: Path, setting: str) -> None:
    branch = config_of(tmp_path, "branch", **RUN, **{setting: str(checkpoint(run, 6))})
    branch.data.prefix = run.data.prefix
    branch.train.dtype = "float32" if setting == "resume" else "bfloat16"  # of weights alone any type is made
    check_settings(branch)
    branch.model.d_ff = 64
    with pytest.raises(ValueError, match="is of another model: model.d_ff 16 -> 64: set back what differs"):
        check_settings(branch)


def test_another_vocabulary_is_named(run: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="is of another model: a vocabulary of 300 there and of 301 here"):
        check_start(run, vocab_size=301)


def test_another_runs_folder_stands_for_its_newest_good_checkpoint(run: PretrainConfig, made: tuple[Path, list[float]]) -> None:
    other = replace(run, run=replace(run.run, dir=str(Path(run.run.dir).parent / "other")))
    other.train = replace(run.train, resume=run.run.dir)
    Path(other.run.dir).mkdir()
    assert resume_candidates(other) == [checkpoint(run, step) for step in (6, 4, 2)]
    spoil(run, 6, "__0_0.distcp", 5000)
    assert go_on(other).of("loss") == made[1][4:]
    assert resume_point(other) == checkpoint(run, 6)  # its folder is left as it is


def test_another_runs_folder_stands_for_the_weights_of_its_newest_good_checkpoint(run: PretrainConfig) -> None:
    anew = replace(run, train=replace(run.train, init_from=run.run.dir))
    assert with_weights(anew).train.init_from == str(checkpoint(run, 6))
    spoil(run, 6, "values.json")
    assert with_weights(anew).train.init_from == str(checkpoint(run, 4))
    named = replace(run, train=replace(run.train, init_from=str(checkpoint(run, 2))))
    assert with_weights(named) == named and with_weights(run) == run
    for step in (2, 4):
        spoil(run, step, "values.json")
    with pytest.raises(ValueError, match="all 3 checkpoints are damaged"):
        with_weights(anew)
