"""A run that replays recorded routing: its own changes nothing, another's is what experts get, and other text ends it at once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.checkpoint.loaded_model import load_model
from megalina.cli.train import check_replays, check_sequences
from megalina.config import PretrainConfig
from megalina.data.source import TokenData, open_data
from megalina.model.routing_recorder import record_routing
from megalina.placement.routing_trace import read_trace, write_trace
from tests.train.small_run import LENGTH, checkpoint, config_of, records_of, start, write_tokens

BATCH, STEPS = 8, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a step in float64, and what its model chooses in the next step and in validation."""
    path, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_tokens(path / "tokens")
    config = run_of(path, "first", steps=1)
    records_of(config)
    gpt = load_model(checkpoint(config, 1), dtype=torch.float64).gpt
    data = data_of(config)
    assert data.valid is not None
    for name, samples, first, count in (("next", data.train, BATCH, BATCH), ("valid", data.valid, 0, 7)):
        batches = [samples.batch(first + i, 1) for i in range(count)]
        write_trace(path / f"{name}.npz", record_routing(gpt, batches, max_tokens=count * LENGTH, name=name))
    yield path
    torch.set_num_threads(threads)


def run_of(folder: Path, run: str, steps: int, **settings: Any) -> PretrainConfig:
    return config_of(folder, run, steps=steps, dtype="float64", interval=1, eval_interval=1, **settings)


def data_of(config: PretrainConfig) -> TokenData:
    return open_data(config.data, seq_len=LENGTH, seed=config.train.seed)


def second_step(folder: Path, run: str, **settings: Any) -> dict[str, Any]:
    """Of a run that goes on from the first one's checkpoint."""
    config = run_of(folder, run, steps=2, allow_changes=True, **settings)
    record: dict[str, Any] = records_of(config, checkpoint(run_of(folder, "first", steps=1), 1)).records[-1]
    return record


def as_it_is(folder: Path) -> dict[str, Any]:
    return second_step(folder, "plain")


def other(folder: Path, name: str) -> Path:
    """The same tokens, each sent to the experts that it was not sent to."""
    trace = read_trace(folder / "next.npz")
    path = folder / f"{name}.npz"
    missing = np.array([[sorted({0, 1, 2, 3} - set(ids)) for ids in of_layers] for of_layers in trace.expert_ids_TLK.tolist()])
    write_trace(path, replace(trace, expert_ids_TLK=missing.astype(np.uint8), weights_TLK=None, ahead_ids_TLK=None))
    return path


def test_replaying_ones_own_choices_changes_nothing(folder: Path) -> None:
    """With a learning rate of zero: validation, after the step, is then of the model that was recorded."""
    files = {"replay": str(folder / "next.npz"), "replay_validation": str(folder / "valid.npz")}
    found, want = second_step(folder, "own", lr=0.0, **files), second_step(folder, "still", lr=0.0)
    for key in ("loss", "aux_loss", "z_loss", "grad_norm", "val_loss"):
        assert found[key] == pytest.approx(want[key], rel=1e-12), key
    assert found["expert_load"] == want["expert_load"]


def test_replaying_other_choices_changes_the_loss_and_leaves_the_routers_losses(folder: Path) -> None:
    found, want = second_step(folder, "others", replay=str(other(folder, "others"))), as_it_is(folder)
    assert abs(found["loss"] - want["loss"]) > 1e-6
    # the first layer reads what it read before, and its load is of its own choices
    assert found["expert_load"][0] == want["expert_load"][0]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_micro_batches_and_recompute_replay_alike(folder: Path, recompute: str) -> None:
    path = str(other(folder, f"alike_{recompute}"))
    alone = second_step(folder, "whole", replay=path, micro_batch_size=8)
    cut = second_step(folder, f"cut_{recompute}", replay=path, micro_batch_size=1, recompute=recompute)
    for key in ("loss", "grad_norm", "val_loss"):
        assert cut[key] == pytest.approx(alone[key], rel=1e-12), key


def test_a_run_whose_text_the_file_lacks_ends_before_its_first_step(folder: Path) -> None:
    config = run_of(folder, "fresh", steps=STEPS, replay=str(folder / "next.npz"))  # of the second step alone
    for begin in (lambda: start(config), lambda: check_sequences(config, data_of(config))):
        with pytest.raises(ValueError, match=r"^router.replay: sequence 0 isn't among the 8 sequences of trace next"):
            begin()
    config = run_of(folder, "fresh", steps=STEPS, replay_validation=str(folder / "next.npz"))
    with pytest.raises(ValueError, match=r"^router.replay_validation: sequence 0 isn't among"):
        check_sequences(config, data_of(config))


def test_a_file_of_another_model_ends_it_too(folder: Path) -> None:
    config = run_of(folder, "fresh", steps=STEPS, replay=str(folder / "next.npz"), num_layers=3)
    for begin in (start, check_replays):
        with pytest.raises(ValueError, match=r"next.npz: it has 2 MoE layers, 0, 1, and the model 3, 0, 1, 2"):
            begin(config)
    with pytest.raises(ValueError, match=r"^router.replay_validation=none.npz can't be read: No such file"):
        check_replays(run_of(folder, "fresh", steps=STEPS, replay_validation="none.npz"))


def test_what_a_run_replays_may_change_when_it_goes_on(folder: Path) -> None:
    """As a file for each round of reinforcement learning does."""
    from megalina.changed_settings import changes
    from megalina.checkpoint.files import read_values

    saved = read_values(checkpoint(run_of(folder, "first", steps=1), 1))["config"]
    found = changes(saved, run_of(folder, "first", steps=1, replay="a.npz"))
    assert [(c.setting, c.kind.name) for c in found] == [("router.replay", "FREE")]
