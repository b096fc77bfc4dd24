"""A run survives kills, stops, bad steps and other beginnings, and its numbers show none of it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalina.checkpoint.files import read_values
from megalina.checkpoint.stored import read_tensors
from megalina.config import PretrainConfig
from megalina.train.trainer import Trainer, train
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import (
    Recorder,
    checkpoint,
    config_of,
    records_of,
    same_checkpoints,
    start,
    steps_kept,
    weights_of,
    write_tokens,
)

ROOT = Path(__file__).resolve().parents[2]
KILLED = {"steps": 120, "ep": 2, "zero": 1, "interval": 10, "keep_last": 2, "eval_interval": 20}
BAD_STEP = 3
VALIDATION: dict[str, dict[str, Any]] = {
    "two copies": {},
    "experts cut": {"ep": 2, "micro_batch_size": 1},
    "experts cut, large micro-batch": {"ep": 2, "micro_batch_size": 4},
    "heads cut": {"tp": 2, "micro_batch_size": 4},
    "heads cut, activations copied": {"tp": 2, "sequence": False, "micro_batch_size": 1},
    "sequences cut": {"cp": 2, "micro_batch_size": 4},
    "sequences cut, heads exchanged": {"cp": 2, "cp_kind": "all_to_all", "micro_batch_size": 1},
}
CAPACITY = {"dtype": "float64", "capacity_factor": 1.0, "steps": 2}


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """A run listens for signals; pytest wants its own handlers back.  One thread, as on ranks."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_tokens(path / "tokens")
    return path


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    """What every scenario below gave on each of two ranks."""
    return run_on_ranks(2, scenarios, folder)


def scenarios(folder: Path) -> dict[str, Any]:
    return {
        "bad step": bad_step(folder),
        "signal": signalled(folder),
        "saves": {mode: records_of(saving(folder, mode)).of("loss") for mode in ("sync", "async")},
        "validation": {name: validation_of(folder, name, **VALIDATION[name]) for name in VALIDATION},
    }


# kills
def uninterrupted(folder: Path) -> list[dict[str, Any]]:
    return records_of(config_of(folder, "uninterrupted", **KILLED)).records


def command(config: PretrainConfig) -> list[str]:
    """The command line that composes this configuration."""

    def flat(values: dict[str, Any], prefix: str) -> list[str]:
        out = []
        for key, value in values.items():
            name = prefix + key
            out += flat(value, f"{name}.") if isinstance(value, dict) else [f"{name}={json.dumps(value)}"]
        return out

    return [sys.executable, str(ROOT / "pretrain_gpt_moe.py"), *flat(asdict(config), "")]


def wait_for_step(process: "subprocess.Popen[bytes]", metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended by itself with {process.returncode} before step {step}"
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.003)
    raise AssertionError(f"step {step} did not come")


def ranks_of(process: "subprocess.Popen[bytes]") -> list[int]:
    """Process ids of the launcher's children, rank 0 first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return sorted(environments, key=lambda pid: b"RANK=0" not in environments[pid])


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
def test_killed_twice_the_same_command_ends_with_the_loss_curve_of_an_uninterrupted_run(folder: Path) -> None:
    whole = run_on_ranks(2, uninterrupted, folder)[0]
    config = config_of(folder, "killed", **KILLED)
    config.launch.ranks = 2
    metrics = Path(config.run.dir) / "metrics.jsonl"

    launcher = subprocess.Popen(command(config), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(launcher, metrics, 15)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    steps_at_kills = [metrics.read_bytes().count(b"\n")]

    launcher = subprocess.Popen(command(config), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(launcher, metrics, 55)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    assert launcher.wait(timeout=60) == 1
    steps_at_kills.append(metrics.read_bytes().count(b"\n"))
    assert max(steps_at_kills) < config.train.steps

    done = subprocess.run(command(config), cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for key in ("step", "loss", "aux_loss", "grad_norm", "lr", "tokens", "val_loss", "dead_experts", "load_entropy"):
        assert [r.get(key) for r in records] == [r.get(key) for r in whole], key
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 120 and summary["finished"] and summary["val_loss"] == records[-1]["val_loss"]
    assert same_checkpoints(checkpoint(config, 120), checkpoint(config_of(folder, "uninterrupted"), 120)) == []
    assert steps_kept(config) == [110, 120]


# steps that aren't finite
def bad_step(folder: Path) -> dict[str, Any]:
    """One infinite element among the gradients of the last rank, in an expert that no other rank holds."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def plant(run: Trainer) -> None:
        seen[run.state.step] = weights_of(run)
        if dist.get_rank() == 1:
            run.built.trainable.buckets["experts.1"].grad[5] = math.inf

    def look(run: Trainer) -> None:
        seen[run.state.step] = weights_of(run)

    config = config_of(folder, "bad step", ep=2, kind="sigmoid", bias_update_rate=0.01)
    run = start(config, after={BAD_STEP - 1: plant, BAD_STEP: look, BAD_STEP + 1: look})
    run.loop()
    assert isinstance(run.tracker, Recorder)
    moved = {
        step: [n for n in seen[step] if not torch.equal(seen[step][n], seen[step - 1][n])] for step in (BAD_STEP, BAD_STEP + 1)
    }
    return {
        "records": run.tracker.records,
        "moved": moved,
        "weights": len(seen[BAD_STEP]),
        "updates": run.built.optimizer.step_count,
    }


def test_a_step_with_one_infinite_gradient_is_skipped_on_all_ranks_and_counted(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        found = rank["bad step"]
        assert found["moved"][BAD_STEP] == [] and len(found["moved"][BAD_STEP + 1]) == found["weights"]
        assert [r["skipped_steps"] for r in found["records"]] == [0, 0, 1, 1, 1, 1]
        assert [math.isfinite(r["grad_norm"]) for r in found["records"]] == [True, True, False, True, True, True]
        assert all(math.isfinite(r["loss"]) for r in found["records"])
        assert found["updates"] == 5


def test_after_a_skipped_step_the_run_resumes_with_its_counts(folder: Path, two_ranks: list[dict[str, Any]]) -> None:
    values = read_values(checkpoint(config_of(folder, "bad step"), 6))
    assert (values["step"], values["optimizer_steps"], values["skipped_steps"], values["consumed_samples"]) == (6, 5, 1, 48)


# stops
def signalled(folder: Path) -> dict[str, Any]:
    """Only the last rank hears SIGTERM."""

    def ask(run: Trainer) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    config = config_of(folder, "signal", ep=2, steps=6)
    first = records_of(config, after={3: ask})
    stopped = steps_kept(config)
    rest = records_of(config, checkpoint(config, stopped[-1]))
    whole = records_of(config_of(folder, "no signal", ep=2, steps=6))
    return {"first": first.of("loss"), "rest": rest.of("loss"), "stopped": stopped, "whole": whole.of("loss")}


def test_sigterm_to_one_rank_lets_all_finish_the_step_and_save_and_the_run_goes_on(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        found = rank["signal"]
        assert found["stopped"] == [4]  # the step after the signal: it was under way when all learnt of it
        assert len(found["first"]) == 4 and found["first"] + found["rest"] == found["whole"]


@pytest.mark.full
def test_a_run_cut_by_exit_step_has_the_losses_and_rates_of_a_whole_one(folder: Path) -> None:
    whole = records_of(config_of(folder, "not cut", steps=8))
    first = records_of(config_of(folder, "cut", steps=8, exit_step=3))
    second = records_of(config_of(folder, "cut", steps=8, exit_step=6), checkpoint(config_of(folder, "cut"), 3))
    third = records_of(config_of(folder, "cut", steps=8), checkpoint(config_of(folder, "cut"), 6))
    for key in ("step", "loss", "lr", "tokens", "consumed_samples"):
        assert first.of(key) + second.of(key) + third.of(key) == whole.of(key)
    assert steps_kept(config_of(folder, "cut")) == [3, 6, 8]
    assert same_checkpoints(checkpoint(config_of(folder, "cut"), 8), checkpoint(config_of(folder, "not cut"), 8)) == []


@pytest.mark.full
def test_the_time_limit_saves_and_stops_and_the_same_command_goes_on(folder: Path) -> None:
    config = config_of(folder, "time", steps=4, max_minutes=1e-9)
    for step in (1, 2, 3, 4):
        summary = train(config)
        assert summary["steps"] == step and summary["finished"] == (step == 4)
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == records_of(config_of(folder, "no time limit", steps=4)).of("loss")


def test_a_model_without_a_moe_layer_trains_too(folder: Path) -> None:
    assert train(config_of(folder, "dense", dense_layers_first=2, steps=2))["finished"]


def test_a_finished_run_has_nothing_left_to_do(folder: Path) -> None:
    config = config_of(folder, "finished", steps=2)
    first, again = train(config), train(config)
    assert again["steps"] == 2 and again["finished"] and again["val_loss"] == first["val_loss"]


# beginnings
@pytest.mark.full
def test_init_from_takes_the_weights_with_a_fresh_optimizer_at_step_zero(folder: Path) -> None:
    old = config_of(folder, "old", kind="sigmoid", bias_update_rate=0.01, dtype="bfloat16", steps=3)
    records_of(old)
    config = config_of(
        folder, "new", kind="sigmoid", bias_update_rate=0.01, dtype="bfloat16", init_from=str(checkpoint(old, 3)), lr=1e-3
    )
    run = start(config)
    run.state.save()
    before, after = read_tensors(checkpoint(old, 3)), read_tensors(checkpoint(config, 0))
    assert before.keys() == after.keys()
    for name, value in after.items():
        kind, _, parameter = name.partition("/")
        if kind == "model":
            assert torch.equal(value, before[name]), name
        elif kind == "master":
            assert torch.equal(value, before[f"model/{parameter}"].float()), name
        else:
            assert not value.any(), name
    assert run.state.step == run.state.tokens == run.built.optimizer.step_count == 0
    run.loop()
    assert isinstance(run.tracker, Recorder)
    assert run.tracker.of("step") == [1, 2, 3, 4, 5, 6] and run.tracker.of("loss")[0] < math.log(300) - 0.02


def test_init_from_another_model_names_the_tensors_that_differ(folder: Path) -> None:
    old = config_of(folder, "narrow", steps=1)
    records_of(old)
    with pytest.raises(
        ValueError, match=r"another model.*model/layers\.0\.experts\.w1: \[4, 32, 32\] in the checkpoint, \[4, 48, 32\]"
    ):
        start(config_of(folder, "wide", d_ff=24, init_from=str(checkpoint(old, 1))))


def test_resume_none_refuses_to_train_over_checkpoints(folder: Path) -> None:
    config = config_of(folder, "in the way", steps=1)
    records_of(config)
    config.train.resume = "none"
    with pytest.raises(ValueError, match=r"resume=none, but .*in the way has a checkpoint of step 1"):
        train(config)


@pytest.mark.full
def test_resume_path_branches_off_another_run(folder: Path) -> None:
    trunk = config_of(folder, "trunk", interval=2)
    losses = records_of(trunk).of("loss")
    branch = config_of(folder, "branch", resume=str(checkpoint(trunk, 4)))
    train(branch)
    lines = (Path(branch.run.dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses[4:]
    with pytest.raises(ValueError, match="nowhere"):
        train(config_of(folder, "lost", resume=str(folder / "nowhere")))


# checkpoints
def saving(folder: Path, mode: str) -> PretrainConfig:
    return config_of(
        folder, f"saves {mode}", ep=2, zero=1, steps=9, interval=1, keep_last=2, keep_every=4, async_save=mode == "async"
    )


@pytest.mark.full
def test_an_asynchronous_save_equals_a_synchronous_one(folder: Path, two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["saves"]["async"] == rank["saves"]["sync"]
    for step in (4, 8, 9):
        sync, background = (checkpoint(saving(folder, mode), step) for mode in ("sync", "async"))
        assert same_checkpoints(sync, background) == []


def test_the_newest_checkpoints_and_every_nth_are_kept(folder: Path, two_ranks: list[dict[str, Any]]) -> None:
    for mode in ("sync", "async"):
        assert steps_kept(saving(folder, mode)) == [4, 8, 9]


# validation
def validation_of(folder: Path, name: str, **settings: Any) -> float | None:
    run = start(config_of(folder, f"validation {name}", **CAPACITY, **settings))
    run.loop()
    return run.validate()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_validation_loss_knows_neither_layout_nor_micro_batch(
    folder: Path, two_ranks: list[dict[str, Any]], micro_batch_size: int
) -> None:
    one = validation_of(folder, f"one {micro_batch_size}", micro_batch_size=micro_batch_size)
    assert one is not None and 4 < one < 6
    for rank in two_ranks:
        for name, loss in rank["validation"].items():
            assert abs(loss - one) < 1e-10, name


def test_the_validation_loss_is_the_mean_over_the_first_sequences(folder: Path) -> None:
    run = start(config_of(folder, "plain validation", dtype="float64", steps=1))
    assert run.data.valid is not None
    batch = run.data.valid.batch(0, 7)
    run.built.trainable.gpt.eval()
    with torch.no_grad():
        want = run.built.trainable.gpt(batch).loss / batch.loss_mask_BS.sum()
    found = run.validate()
    assert found is not None and abs(found - want.item()) < 1e-12


@pytest.mark.full
def test_losses_know_no_micro_batch_where_groups_are_sequences(folder: Path) -> None:
    losses = [
        records_of(config_of(folder, f"micro-batch {size}", dtype="float64", capacity_factor=1.0, micro_batch_size=size)).of(
            "loss"
        )
        for size in (1, 2, 8)
    ]
    for other in losses[1:]:
        assert max(abs(a - b) for a, b in zip(losses[0], other, strict=True)) < 1e-10
