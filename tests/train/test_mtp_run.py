"""A run with multi-token prediction: its loss is reported and falls, weighs less at the end; what is served has none of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.files import left_out, read_values
from megalina.checkpoint.loaded_model import load_model
from megalina.checkpoint.stored import read_tensors
from megalina.parallel.step_result import StepResult
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, start, write_tokens

STEPS = 8
RUN: dict[str, Any] = {
    "mtp_layers": 1, "num_layers": 1, "steps": STEPS, "interval": 4, "mtp_final_fraction": 0.5, "mtp_final_ratio": 0.25,
    "kind": "sigmoid", "bias_update_rate": 0.01, "lr": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_tokens(path / "tokens")
    yield path
    torch.set_num_threads(threads)


def test_it_is_learned_reported_resumed_and_left_out_where_the_model_is_served(folder: Path) -> None:
    config = config_of(folder, "run", **RUN)
    recorder = records_of(config)
    losses = recorder.of("mtp_loss")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    half = checkpoint(config, STEPS // 2)
    resumed = config_of(folder, "goes on", **RUN)
    assert records_of(resumed, half).of("mtp_loss") == losses[STEPS // 2 :]
    last = checkpoint(config, STEPS)
    assert same_checkpoints(last, checkpoint(resumed, STEPS)) == []
    stored, gpt = read_tensors(last), load_model(last).gpt
    assert {n for n in stored if n.startswith("model/layers.1.mtp")} == {
        f"model/layers.1.mtp.{name}" for name in ("embedding_norm.weight", "hidden_norm.weight", "projection", "norm.weight")
    }
    assert len(gpt.layers) == 1 and gpt.config.mtp_layers == 0
    assert left_out(read_values(last)) == "1 layers of multi-token prediction are left out: they serve training alone"


def test_its_gradients_have_the_weight_of_the_step(folder: Path) -> None:
    """Those of the layer itself, which nothing else reaches but the auxiliary losses."""
    run = start(config_of(folder, "weights", mtp_layers=1, num_layers=1, balance_loss=0.0, z_loss=0.0))
    trainable, found = run.built.trainable, []
    for factor in (1.0, 0.25):
        gradients: dict[str, torch.Tensor] = {}

        def update(name: str, _: StepResult, gradients: dict[str, torch.Tensor] = gradients) -> None:
            gradients[name] = trainable.buckets[name].grad.clone()

        trainable.step(run.data.train.batch(0, 8), update, loss_factors={"mtp_loss": factor})
        for bucket in trainable.buckets.values():
            bucket.grad.zero_()
        found.append(gradients)
    torch.testing.assert_close(found[1]["dense.1"], 0.25 * found[0]["dense.1"], rtol=1e-5, atol=1e-9)
    assert not torch.allclose(found[1]["dense.0"], 0.25 * found[0]["dense.0"], rtol=1e-2)  # the main loss is as it was
