"""A model whose weights have overflowed looks alive: a finite loss, no error.  It is told from a living one by that very loss."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalina.config import LARGEST_FACTOR, PretrainConfig
from megalina.train.guard import DEAD_STEPS, DeadModel
from megalina.validate import check_config, value_at
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import VOCABULARY, Recorder, config_of, start, write_tokens


def step(loss: float, grad_norm: float = 1.0) -> Any:
    return SimpleNamespace(loss=loss, grad_norm=grad_norm)


def test_a_loss_of_ln_vocabulary_is_told_once_and_again_after_life() -> None:
    watch, even = DeadModel(512), math.log(512)
    told = [watch.warnings(step(even * (1 + 1e-7), math.nan)) for _ in range(5)]
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 0] and DEAD_STEPS == 3 and watch.dead
    assert "its loss is ln(vocabulary 512) = 6.238325 to the last digits; it learns nothing" in told[2][0]
    assert watch.warnings(step(even + 0.001)) == [] and not watch.dead
    assert [len(watch.warnings(step(even))) for _ in range(3)] == [0, 0, 1]
    assert watch.warnings(step(math.nan, math.nan)) == [] and watch.dead  # a step that is skipped revives nobody


def test_no_gradient_is_told_and_a_loss_near_ln_vocabulary_is_not() -> None:
    watch = DeadModel(512)
    assert [len(watch.warnings(step(3.0, 0.0))) for _ in range(3)] == [0, 0, 1]
    watch = DeadModel(512)
    assert not any(watch.warnings(step(math.log(512) * (1 + 1e-5), 1e-9)) for _ in range(9))
    assert not any(DeadModel(1).warnings(step(0.0)) for _ in range(9))  # one word: its loss is ln 1


def overflowing(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    torch.set_num_threads(1)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    config = config_of(folder, f"dead on {world}", ep=world, init_std=1e30, steps=4)
    run = start(config)
    run.loop()
    assert isinstance(run.tracker, Recorder)
    return [{k: r.get(k) for k in ("loss", "grad_norm", "warnings")} for r in run.tracker.records], run.close()


def test_a_run_whose_weights_overflow_is_told_on_all_ranks_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokens(tmp_path / "tokens")
    with caplog.at_level(logging.WARNING, "megalina"):
        records, summary = overflowing(tmp_path)
    assert records[-1]["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)  # finite, and nothing learned
    assert [bool(record["warnings"]) for record in records] == [False, False, True, False]
    assert any(message.startswith("warning: step 3: the model is dead: for 3 steps its loss is") for message in caplog.messages)
    assert summary["dead_model"] is True and json.dumps(summary)
    for records, _ in run_on_ranks(2, overflowing, tmp_path):
        assert [bool(record["warnings"]) for record in records] == [False, False, True, False]


@pytest.mark.parametrize(
    "key", ["optim.lr", "model.init_std", "router.scale", "router.balance_loss", "router.z_loss", "optim.weight_decay"]
)
def test_what_float32_cannot_square_is_refused(key: str) -> None:
    assert torch.tensor(LARGEST_FACTOR).square() * 1e12 < torch.inf
    config = PretrainConfig()
    head, _, name = key.rpartition(".")
    for value in (1e30, 2 * LARGEST_FACTOR):
        setattr(value_at(config, head), name, value)
        with pytest.raises(ValueError, match=rf"^{key}=.* must be .* at most 1000000000000$"):
            check_config(config, 1)
