"""`train.resume=verify` runs the last steps again: equal to the last bit in the same layout, up to rounding in another, and
what was changed behind its back is named."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.batch import Batch
from megalina.checkpoint.files import read_values
from megalina.train.replay import ReplayDiffers, replay
from megalina.train.trainer import Trainer
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, start, write_tokens
from tests.train.test_trainer import _process_state  # noqa: F401  handlers of signals come back

SETTINGS: dict[str, Any] = {"steps": 9, "interval": 4, "exit_step": 8, "dtype": "float64", "zero": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("replay")
    write_tokens(folder / "tokens")
    yield folder


def verified(run: Trainer, log: list[str], newest: Path, before: Path | None) -> None:
    """Replay, with what it says added to `log`."""
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megalina")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        replay(run.runner, newest, before)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def ends_with(folder: Path, name: str, **settings: Any) -> list[str]:
    """On each rank: the log of a replay of the run "trunk" in this layout."""
    config = config_of(folder, name, **(SETTINGS | settings))
    run, log = start(config), []
    trunk = config_of(folder, "trunk", **SETTINGS)
    verified(run, log, checkpoint(trunk, 8), checkpoint(trunk, 4))
    assert run.state.step == 8
    return log


def trunk_of(folder: Path) -> None:
    records_of(config_of(folder, "trunk", **SETTINGS))


@pytest.mark.full
def test_the_same_layout_is_equal_to_the_last_bit_and_others_up_to_rounding(folder: Path) -> None:
    run_on_ranks(1, trunk_of, folder)
    (same,) = run_on_ranks(1, ends_with, folder, "same")
    assert len(same) == 1 and "steps 5 to 8" in same[0] and "equal to the last bit" in same[0]
    (other,) = run_on_ranks(1, _micro_batch_one, folder)
    assert "another batch" in other[0] and "allowed: 1e-10" in other[0]
    first, second = run_on_ranks(2, _tp_two, folder)
    assert "another mesh, parallel, batch" in first[0] and second == []
    first, second = run_on_ranks(2, _ep_two, folder)
    assert "another mesh, parallel" in first[0] and second == []
    first, second = run_on_ranks(2, _cp_two, folder)
    assert "another mesh, parallel" in first[0] and "allowed: 1e-10" in first[0] and second == []


def _micro_batch_one(folder: Path) -> list[str]:
    return ends_with(folder, "micro", micro_batch_size=1)


def _tp_two(folder: Path) -> list[str]:
    return ends_with(folder, "tp", tp=2, micro_batch_size=4)


def _cp_two(folder: Path) -> list[str]:
    return ends_with(folder, "cp", cp=2)


def _ep_two(folder: Path) -> list[str]:
    return ends_with(folder, "ep", ep=2)


CHANGES: dict[str, tuple[Callable[[Batch], Batch], str]] = {
    "one token": (lambda b: replace(b, tokens_BS=_changed(b.tokens_BS)), "step 5, run again .* first difference: the batch"),
    "another order": (lambda b: replace(b, sample_B=b.sample_B + 1), "first difference: the batch's tokens"),
}


def _changed(tokens: torch.Tensor) -> torch.Tensor:
    out = tokens.clone()
    out[0, 0] = (out[0, 0] + 1) % 7
    return out


@pytest.fixture
def trunk(folder: Path) -> Path:
    config = config_of(folder, "trunk", **SETTINGS)
    if not checkpoint(config, 8).exists():
        records_of(config)
    return folder


def one(folder: Path, name: str, **settings: Any) -> tuple[Trainer, Path, Path]:
    trunk = config_of(folder, "trunk", **SETTINGS)
    return start(config_of(folder, name, **(SETTINGS | settings))), checkpoint(trunk, 8), checkpoint(trunk, 4)


@pytest.mark.parametrize("what", CHANGES)
def test_changed_data_is_named(trunk: Path, what: str) -> None:
    run, newest, before = one(trunk, f"changed {what}")
    change, message = CHANGES[what]
    batch_of = run.data.train.batch
    run.data.train.batch = lambda first, count, stride=1: change(batch_of(first, count, stride))  # type: ignore[method-assign]
    with pytest.raises(ReplayDiffers, match=message):
        replay(run.runner, newest, before)


def test_a_drawn_random_number_is_named(trunk: Path) -> None:
    run, newest, before = one(trunk, "draws")
    step = run.built.trainable.step
    run.built.trainable.step = lambda *a, **k: (torch.rand(1), step(*a, **k))[1]  # type: ignore[method-assign]
    with pytest.raises(ReplayDiffers, match="first difference: the random state"):
        replay(run.runner, newest, before)


def test_a_changed_router_is_named_with_its_layer(trunk: Path) -> None:
    run, newest, before = one(trunk, "router")
    load = run.state.load

    def load_and_spoil(path: Path) -> None:
        load(path)
        run.built.trainable.gpt.layers[1].router.weight.data.neg_()  # type: ignore[union-attr,operator]

    run.state.load = load_and_spoil  # type: ignore[method-assign]
    with pytest.raises(ReplayDiffers, match="first difference: the routing of layer 1"):
        replay(run.runner, newest, before)


def test_a_changed_learning_rate_shows_in_the_next_loss_or_routing(trunk: Path) -> None:
    run, newest, before = one(trunk, "rate", lr=4e-3)
    with pytest.raises(ReplayDiffers, match="step 6, run again .*first difference: the (routing|loss)"):
        replay(run.runner, newest, before)


def test_other_weights_in_the_checkpoint_are_named(trunk: Path) -> None:
    run, newest, before = one(trunk, "weights")
    load = run.state.load

    def load_and_spoil(path: Path) -> None:
        load(path)
        if path == newest:
            run.built.trainable.gpt.layers[0].experts.w2.data.mul_(1.0 + 2.0**-40)

    run.state.load = load_and_spoil  # type: ignore[method-assign]
    with pytest.raises(ReplayDiffers, match=r"after step 8 model/layers\.0\.experts\.w2 is not what"):
        replay(run.runner, newest, before)


def test_from_the_beginning_without_an_earlier_checkpoint_if_the_ledger_goes_back(trunk: Path) -> None:
    config = config_of(trunk, "young", **(SETTINGS | {"interval": 0, "exit_step": 3}))
    records_of(config)
    run, log = start(config_of(trunk, "young again", **(SETTINGS | {"interval": 0}))), []  # type: ignore[var-annotated]
    verified(run, log, checkpoint(config, 3), None)
    assert "steps 1 to 3" in log[0]
    run, newest, _ = one(trunk, "too far back")
    assert [line["step"] for line in read_values(newest)["ledger"]] == list(range(1, 9))
    records_of(config_of(trunk, "old", **(SETTINGS | {"interval": 2})))
    with pytest.raises(ValueError, match="has no ledger of step 1 .*; go on with train.resume=auto"):
        replay(run.runner, checkpoint(config_of(trunk, "old", **SETTINGS), 8), None)


def test_the_ledger_file_has_every_step_once_also_after_a_resume(trunk: Path) -> None:
    config = config_of(trunk, "file", **(SETTINGS | {"exit_step": 5, "interval": 3}))
    records_of(config)
    whole = config_of(trunk, "file", **(SETTINGS | {"exit_step": 0, "interval": 3}))
    records_of(whole, checkpoint(config, 3))
    records_of(config_of(trunk, "file at once", **(SETTINGS | {"exit_step": 0, "interval": 3})))
    files = [(trunk / name / "ledger.jsonl").read_text() for name in ("file", "file at once")]
    assert files[0] == files[1]
    assert [json.loads(line)["step"] for line in files[0].splitlines()] == list(range(1, 10))
    assert all(len(json.loads(line)["routing"]) == 2 for line in files[0].splitlines())
