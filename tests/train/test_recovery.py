"""What a run does about steps that can't be trusted: spikes are skipped or left behind, values that are not finite are named."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.batch import Batch
from megalina.checkpoint.files import SaveFailed
from megalina.config import GuardConfig, PretrainConfig
from megalina.parallel.step_result import CollectivesDiffer
from megalina.rank_files import Unsaved
from megalina.train.guard import LOW_STEPS
from megalina.train.recovery import SpikesGoOn
from megalina.train.run_state import RunState
from megalina.train.trainer import Trainer, train
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import (
    VOCABULARY,
    Recorder,
    checkpoint,
    config_of,
    records_of,
    same_checkpoints,
    start,
    steps_kept,
    write_tokens,
)
from tests.train.test_trainer import _process_state  # noqa: F401  handlers of signals come back

STEPS = 40
GUARD: dict[str, Any] = {"window": 8, "threshold": 3.0, "min_rise": 0.5}
BAD = range(8 * 27, 8 * 29)  # two batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("recovery")
    write_tokens(folder / "tokens")
    yield folder


def config(folder: Path, name: str, spike: str, **settings: Any) -> PretrainConfig:
    out = config_of(folder, name, **({"steps": STEPS, "interval": 10, "lr": 1e-2, "micro_batch_size": 4} | settings))
    out.guard = GuardConfig(**(GUARD | {"spike": spike}))
    return out


def corrupt(run: Trainer, bad: range = BAD) -> None:
    """The text of these sequences is noise."""
    batch_of = run.data.train.batch

    def spoiled(first: int, count: int, stride: int = 1) -> Batch:
        batch = batch_of(first, count, stride)
        hit = torch.tensor([int(s) in bad for s in batch.sample_B])
        noise = (batch.sample_B.unsqueeze(1) * 31 + torch.arange(batch.tokens_BS.shape[1]) ** 2 * 7) % VOCABULARY
        return replace(batch, labels_BS=torch.where(hit.unsqueeze(1), noise, batch.labels_BS))

    run.data.train.batch = spoiled  # type: ignore[method-assign]


def recorder(run: Trainer) -> Recorder:
    assert isinstance(run.tracker, Recorder)
    return run.tracker


def test_after_a_rewind_the_run_is_the_one_that_never_saw_the_window(folder: Path) -> None:
    spoiled = start(config(folder, "spoiled", "rewind"))
    corrupt(spoiled)
    spoiled.loop()
    assert spoiled.state.rewinds == 2 and spoiled.state.step == STEPS  # one for each bad batch
    windows = spoiled.state.windows
    assert windows == [(8 * 20, 8 * 28), (8 * 20, 8 * 29)]
    innocent = config(folder, "innocent", "rewind")
    innocent.data.skip_samples = [8 * 20, 8 * 29]
    losses = records_of(innocent).of("loss")
    assert losses[-10:] == [record["loss"] for record in recorder(spoiled).records[-10:]]
    same = same_checkpoints(checkpoint(innocent, STEPS), checkpoint(config(folder, "spoiled", "rewind"), STEPS))
    assert same == ["rewinds", "skipped_samples"]
    lines = [json.loads(line) for line in (folder / "spoiled" / "ledger.jsonl").read_text().splitlines()]
    events = [line for line in lines if line.get("event") == "rewind"]
    assert [(event["step"], event["from_step"]) for event in events][-1] == (20, 21)
    assert [line["step"] for line in lines if "event" not in line] == list(range(1, STEPS + 1))
    assert max(line["samples"][0] for line in lines if "event" not in line) == 8 * (STEPS - 1 + 9)


@pytest.mark.full
def test_without_the_guard_the_same_text_does_change_the_run(folder: Path) -> None:
    run = start(config(folder, "unguarded", "none"))
    corrupt(run)
    run.loop()
    losses = recorder(run).of("loss")
    assert losses[27] > losses[26] + 0.3 and run.state.skipped_steps == 0


@pytest.mark.full
def test_skip_leaves_the_update_out_and_counts_it(folder: Path) -> None:
    run = start(config(folder, "skip", "skip"))
    corrupt(run)
    run.loop()
    assert run.state.skipped_steps == 2 and run.state.rewinds == 0 and run.built.optimizer.step_count == STEPS - 2
    assert [record["skipped_steps"] for record in recorder(run).records[26:30]] == [0, 1, 2, 2]


@pytest.mark.full
def test_spikes_that_go_on_end_the_run_with_the_numbers(folder: Path) -> None:
    for spike, where in (("skip", "in a row"), ("rewind", "since the last checkpoint")):
        settings = config(folder, f"endless {spike}", spike)
        settings.guard.max_spikes = 3
        run = start(settings)
        corrupt(run, range(8 * 27, 10**6))
        with pytest.raises(SpikesGoOn, match=f"it is spike 4 {where} and guard.max_spikes is 3"):
            run.loop()


@pytest.mark.full
def test_before_the_first_checkpoint_a_spike_is_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(config(folder, "early", "rewind", interval=0))
    corrupt(run)
    with caplog.at_level(logging.WARNING, "megalina"):
        run.loop()
    assert run.state.rewinds == 0 and run.state.skipped_steps == 2
    assert "there is no checkpoint to go back to yet" in caplog.text


def rewound(folder: Path) -> tuple[int, list[float]]:
    run = start(config(folder, "two ranks", "rewind", ep=2, zero=1))
    corrupt(run)
    run.loop()
    return run.state.rewinds, recorder(run).of("loss")[-5:]


@pytest.mark.full
def test_all_ranks_go_back_alike(folder: Path) -> None:
    first, second = run_on_ranks(2, rewound, folder)
    assert first == second and first[0] == 2


# values that are not finite
def poisoned(folder: Path, what: str, ranks: int) -> list[str]:
    """A run of four steps on these ranks in which the third is bad; the warnings of this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megalina").addHandler(handler)

    def poison(run: Trainer) -> None:
        if what == "weight" and run.built.mesh.world.rank == ranks - 1:
            run.built.trainable.gpt.layers[1].experts.w2.data[0, 0] = float("nan")
        if what == "gradient":
            run.built.trainable.gpt.layers[0].attention_norm.weight.grad[3] = float("inf")  # type: ignore[index]

    settings = config_of(folder, f"poisoned {what} {ranks}", steps=4, ep=ranks)
    run = start(settings, after={2: poison})
    run.loop()
    assert run.state.skipped_steps == (2 if what == "weight" else 1)
    return [line for line in lines if "skipped" in line]


@pytest.mark.full
def test_a_bad_weight_is_named_by_the_first_instruction_that_gives_a_bad_value(folder: Path) -> None:
    for ranks in (1, 2):
        lines = run_on_ranks(ranks, poisoned, folder, "weight", ranks)
        assert all(own == [] for own in lines[1:])
        assert len(lines[0]) == 2 and "step 3 is skipped on all ranks: loss nan" in lines[0][0]
        assert f"the first is the output of instruction F:experts.1.0 on rank {ranks - 1}" in lines[0][0]


def test_a_bad_gradient_is_named_with_its_parameter(folder: Path) -> None:
    (lines,) = run_on_ranks(1, poisoned, folder, "gradient", 1)
    assert len(lines) == 1 and "every value of the forward pass is finite, so it arose in backward" in lines[0]
    assert "gradients: layers.0.attention_norm.weight" in lines[0]


# routers that collapse
@pytest.mark.full
def test_a_router_that_sends_all_tokens_to_one_expert_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config_of(folder, "collapsed", steps=2 * LOW_STEPS, lr=0.0, top_k=1)
    run = start(settings)
    with torch.no_grad():
        run.built.trainable.gpt.layers[1].router.weight.zero_()  # type: ignore[union-attr,operator]
    with caplog.at_level(logging.WARNING, "megalina"):
        run.loop()
    said = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    assert len(said) == 1 and f"step {LOW_STEPS}: layer 1: the router has collapsed" in said[0]
    assert "4.0 times its share" in said[0]


# what is mixed up after the verdict
def mixed_up(folder: Path) -> str:
    def mix(run: Trainer) -> None:
        kinds = ("gather", "sum")
        axis = run.built.mesh.world
        run.runner.log.submit(axis.name, axis.ranks, kinds[axis.rank], "float32", (), 16)

    settings = config_of(folder, "mixed up", ep=2, zero=1, steps=3, interval=2)
    run = start(settings, after={2: mix})
    with pytest.raises(CollectivesDiffer) as raised:
        run.loop()
    assert not list((folder / "mixed up").glob("checkpoints/step_*"))
    return str(raised.value)


def test_no_checkpoint_is_written_when_the_last_collectives_differ(folder: Path) -> None:
    first, second = run_on_ranks(2, mixed_up, folder)
    assert "did not submit the same collectives" in first or "is not the same on all ranks" in first
    assert bool(second)


# a full disk
def full_at(run: Trainer, steps: set[int]) -> None:
    save = run.state.checkpoints.save

    def sometimes(step: int, *arguments: Any, **more: Any) -> None:
        if step in steps:
            raise SaveFailed(Path("step"), 0, "No space left on device")
        save(step, *arguments, **more)

    run.state.checkpoints.save = sometimes  # type: ignore[method-assign]


def test_a_save_that_fails_is_counted_and_the_run_goes_on(folder: Path) -> None:
    settings = config_of(folder, "full once", steps=6, interval=2)
    run = start(settings)
    full_at(run, {4})
    run.loop()
    assert recorder(run).of("failed_saves") == [0, 0, 0, 0, 1, 1]
    assert steps_kept(settings) == [2, 6]


def test_a_run_whose_last_state_can_not_be_saved_ends_with_an_error(folder: Path) -> None:
    settings = config_of(folder, "full at the end", steps=6, interval=2)
    run = start(settings)
    full_at(run, {6})
    with pytest.raises(Unsaved, match="the state after step 6 could not be saved"):
        run.loop()
    assert run.state.failed_saves == 2 and steps_kept(settings) == [2, 4]  # it was tried twice


def test_a_run_whose_last_state_can_not_be_saved_writes_its_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config_of(folder, "full, with report", steps=2, interval=1)
    settings.tracker.tensorboard, settings.tracker.wandb.mode = False, "disabled"

    Path(settings.run.dir).mkdir(exist_ok=True)
    (Path(settings.run.dir) / "config.yaml").write_text("model: {name: tiny}\n")

    def close(state: RunState) -> None:
        raise Unsaved("make room")

    monkeypatch.setattr(RunState, "close", close)
    with pytest.raises(Unsaved, match="^make room$") as caught:
        train(settings)
    assert not hasattr(caught.value, "__notes__")  # no place in the program: nothing is wrong there
    assert (Path(settings.run.dir) / "report.html").exists()
