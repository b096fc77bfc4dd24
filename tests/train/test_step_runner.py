"""The step runner: each step has the sequences that are its own, whatever was made ahead, and all parts see a repack at once."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalina.batch import Batch
from megalina.collective_log import CollectiveLog
from megalina.config import GuardConfig, PretrainConfig
from megalina.data.prefetch import PREFETCH, Prefetch
from megalina.data.source import open_data
from megalina.mesh import build_meshes
from megalina.train.step_runner import StepRunner
from tests.train.small_run import config_of, start, write_tokens

GLOBAL = 8  # sequences a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_tokens(path / "tokens")
    return path


def runner_of(config: PretrainConfig) -> StepRunner:
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    return StepRunner(config, data, device=torch.device("cpu"))


def samples(runner: StepRunner) -> list[int]:
    return [int(s) for s in runner.batch.sample_B]


def asked_of(runner: StepRunner, act: Callable[[int], None] = lambda first: None) -> list[int]:
    """What is asked of the source from now on."""
    batch_of, asked = runner.data.train.batch, list[int]()

    def noted(first: int, count: int, stride: int = 1) -> Batch:
        asked.append(first)
        act(first)
        return batch_of(first, count, stride)

    runner.data.train.batch = noted  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize("keep", [True, False])
def test_memory_is_kept_from_the_first_step_on_not_while_the_model_is_built_and_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    kept: list[int] = []
    monkeypatch.setattr("megalina.train.step_runner.keep_memory", lambda: kept.append(runner.state.step))
    config = config_of(folder, f"kept{keep}", steps=2)
    runner = runner_of(replace(config, train=replace(config.train, keep_memory=keep)))
    assert kept == []
    for step in (1, 2):
        runner.compute(step)
    runner.close()
    assert kept == [0] * keep


def test_each_step_has_its_own_sequences_and_none_are_made_beyond_the_last(folder: Path) -> None:
    runner = runner_of(config_of(folder, "plain", steps=3))
    asked = asked_of(runner)
    for step in (1, 2, 3):
        runner.compute(step)
        assert samples(runner) == list(range(GLOBAL * (step - 1), GLOBAL * step))
    runner.close()
    assert asked == [0, GLOBAL, 2 * GLOBAL]


def test_sequences_that_are_passed_over_are_never_trained_on(folder: Path) -> None:
    """As a rewind does it: the state goes back, and a window is new, while the batch after the last one has been made already."""
    config = config_of(folder, "windows", steps=6)
    config.data.skip_samples = [GLOBAL, 2 * GLOBAL]
    runner, seen = runner_of(config), list[int]()
    for step in (1, 2):
        runner.compute(step)
        seen.append(samples(runner)[0])
    assert seen == [0, 2 * GLOBAL]
    runner.state.consumed_samples = 0
    runner.state.windows = [(GLOBAL, 2 * GLOBAL), (2 * GLOBAL, 3 * GLOBAL)]
    for step in (1, 2):
        runner.compute(step)
        seen.append(samples(runner)[0])
    runner.close()
    assert seen[2:] == [0, 3 * GLOBAL]


def test_no_bit_depends_on_what_was_made_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation asks for other sequences between the steps."""
    config = replace(config_of(folder, "ahead", steps=4, eval_interval=1, interval=0), guard=GuardConfig(spike="none"))
    run = start(config)
    run.loop()
    ahead = [(r["loss"], r["val_loss"], r["grad_norm"]) for r in run.tracker.records]  # type: ignore[union-attr]
    run.runner.close()
    monkeypatch.setattr(Prefetch, "take", lambda self, first, count, *, following: self._made(first, count))
    (folder / "one by one").mkdir()
    run = start(replace(config, run=replace(config.run, dir=str(folder / "one by one"))))
    run.loop()
    assert [(r["loss"], r["val_loss"], r["grad_norm"]) for r in run.tracker.records] == ahead  # type: ignore[union-attr]


def test_an_error_of_the_source_is_raised_in_the_step_that_needs_it(folder: Path) -> None:
    run = start(config_of(folder, "broken", steps=4, interval=0))

    def broken(first: int) -> None:
        if first == 2 * GLOBAL:
            raise OSError("tokens.bin: the disk is gone")

    asked_of(run.runner, broken)
    with pytest.raises(OSError, match="^tokens.bin: the disk is gone$"):
        run.loop()
    assert run.state.step == 2 and run.runner.log.position.step == 3
    run.runner.close()


def test_a_closed_runner_leaves_no_thread(folder: Path) -> None:
    before = set(threading.enumerate())
    runner = runner_of(config_of(folder, "closed", steps=4))
    runner.compute(1)
    assert any(t.name.startswith(PREFETCH) for t in threading.enumerate())
    runner.close()
    assert set(threading.enumerate()) <= before


def test_runners_that_take_turns_may_share_meshes_and_a_log(folder: Path) -> None:
    config, meshes, log = config_of(folder, "turns", steps=2), build_meshes(packings=(1,)), CollectiveLog(0)
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    runners = [StepRunner(config, data, device=torch.device("cpu"), meshes=meshes, log=log) for _ in range(2)]
    losses = [[runner.compute(step)[0].loss for runner in runners] for step in (1, 2)]
    assert all(a == b for a, b in losses)
    assert all(r.log is log and r.trainable.log is log and r.mesh is meshes[1] for r in runners)
    for runner in runners:
        runner.close()


def test_all_parts_hold_the_same_record_of_what_is_trained(folder: Path) -> None:
    run = start(config_of(folder, "parts"))
    assert run.built is run.runner.built and run.built is run.state.built and run.state is run.runner.state
