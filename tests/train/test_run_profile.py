"""The profile of a run: what training's own routers decided, on any layout, and a training that doesn't notice it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megalina.checkpoint.files import read_values
from megalina.checkpoint.inspection import faults
from megalina.checkpoint.loaded_model import load_model
from megalina.checkpoint.profile import PROFILE, find_profile
from megalina.config import PretrainConfig, ProfileConfig, StrategyConfig
from megalina.data.source import open_data
from megalina.placement.routing_trace import RoutingTrace
from megalina.train.run_profile import RunProfile, is_stable
from megalina.validate import check_config
from tests.model.test_routing_recorder import chosen_by_hand
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import LENGTH, checkpoint, config_of, records_of, same_checkpoints, write_tokens

STEP_TOKENS = 8 * LENGTH
EVERY_STEP = {"window": 1, "stable_change": 1e9}  # from the third step on
PROFILE_OF_TWO_STEPS = ProfileConfig(record=True, tokens=2 * STEP_TOKENS, last_steps=2, **EVERY_STEP)
# With a rate of 0 the weights stay as they are, so that those of the checkpoint are those with which its last steps were made.
LAST = 4
STILL = {"dtype": "float64", "lr": 0.0, "steps": LAST}
EAGER = StrategyConfig()
LAYOUTS: dict[str, tuple[dict[str, Any], StrategyConfig]] = {
    "computed again": ({"ep": 2, "recompute": "full"}, EAGER),
    "tp": ({"tp": 2}, EAGER),
    "pipeline": ({"pp": 2, "pp_layout": "Et|tL"}, EAGER),
    "head alone": (
        {"pp": 2, "pp_layout": "Ett|L", "group": "micro_batch"},
        StrategyConfig(name="flow", parts=2, pipeline="zb_h1"),
    ),
    "in parts": ({"ep": 2, "group": "micro_batch"}, StrategyConfig(name="flow", parts=2)),
}


def run(folder: Path, name: str, profile: ProfileConfig, strategy: StrategyConfig = EAGER, **settings: Any) -> Any:
    config = replace(config_of(folder, name, **settings), profile=profile, strategy=strategy)
    return config, records_of(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_tokens(path / "tokens")
    yield path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def still(folder: Path) -> PretrainConfig:
    return run(folder, "still", PROFILE_OF_TWO_STEPS, **STILL)[0]


def trace_at(config: PretrainConfig, step: int) -> RoutingTrace:
    found = find_profile(checkpoint(config, step))
    assert found is not None
    return found


def jobs(folder: Path) -> None:
    for name, (settings, strategy) in LAYOUTS.items():
        run(folder, name, PROFILE_OF_TWO_STEPS, strategy, **STILL, **settings)


def test_what_is_recorded_is_what_the_routers_choose_for_the_last_steps_tokens(folder: Path, still: PretrainConfig) -> None:
    trace = trace_at(still, LAST)
    data = open_data(still.data, seq_len=LENGTH, seed=still.train.seed)
    gpt = load_model(checkpoint(still, LAST), dtype=torch.float64).gpt
    ids, weights = chosen_by_hand(gpt, data.train.batch(2 * 8, 2 * 8))  # of the third and fourth step
    assert np.array_equal(trace.expert_ids_TLK, ids.numpy())
    assert trace.weights_TLK is not None and np.abs(trace.weights_TLK - weights.numpy()).max() < 1e-3
    assert trace.sample_lengths_S.tolist() == [LENGTH] * 16
    assert (trace.name, trace.num_experts, trace.layers) == ("tiny, training steps 3 to 4", 4, (0, 1))
    assert faults(checkpoint(still, LAST)) == []


@pytest.mark.full
def test_every_layout_records_the_same_tokens(folder: Path, still: PretrainConfig) -> None:
    run_on_ranks(2, jobs, folder)
    one = trace_at(still, LAST)
    for name in LAYOUTS:
        trace = trace_at(config_of(folder, name), LAST)
        assert np.array_equal(trace.expert_ids_TLK, one.expert_ids_TLK), name
        assert trace.sample_lengths_S.tolist() == one.sample_lengths_S.tolist()


@pytest.mark.full
def test_training_does_not_notice(folder: Path) -> None:
    off, without = run(folder, "off", ProfileConfig(), interval=3)
    on, with_profile = run(folder, "on", replace(PROFILE_OF_TWO_STEPS, tokens=41), interval=3)
    assert with_profile.of("loss") == without.of("loss") and with_profile.of("grad_norm") == without.of("grad_norm")
    for step in (3, 6):
        assert same_checkpoints(checkpoint(off, step), checkpoint(on, step)) == ["profile"]
        assert find_profile(checkpoint(off, step)) is None
    assert trace_at(on, 3).num_tokens == 21 and trace_at(on, 6).num_tokens == 41  # one step, then two but for a token
    assert read_values(checkpoint(off, 6))["profile"] == {"stable": False, "balance_losses": []}


def test_a_run_that_goes_on_knows_that_the_loss_was_stable(folder: Path) -> None:
    config, _ = run(folder, "goes on", PROFILE_OF_TWO_STEPS, interval=3, exit_step=3, async_save=True)
    assert trace_at(config, 3).name.endswith("steps 3 to 3")
    longer = replace(config, train=replace(config.train, exit_step=4))
    records_of(longer, checkpoint(config, 3))
    assert trace_at(config, 4).name.endswith("steps 4 to 4")


def test_a_profile_that_cannot_be_written_fails_the_save_and_not_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replaced = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == PROFILE and "step_00000003" in str(target):
            raise OSError(28, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", full)
    config, records = run(folder, "full disk", PROFILE_OF_TWO_STEPS, interval=3)
    assert records.records[-1]["failed_saves"] == 1 and "No space left on device" in caplog.text
    assert [p.name for p in (Path(config.run.dir) / "checkpoints").iterdir()] == ["step_00000006"]
    assert trace_at(config, 6).num_tokens == 2 * STEP_TOKENS


@pytest.mark.parametrize(
    ("losses", "stable"),
    [
        ([1.0] * 5, False),  # too few to tell
        ([1.0] * 6, True),
        ([2.0, 2.0, 2.0, 1.0, 1.0, 1.0], False),
        ([9.0, 1.0, 1.2, 1.1, 1.1, 1.0, 1.2], True),  # only the newest count
        ([1.0, 1.0, 1.0, 1.02, 1.02, 1.02], True),
        ([1.0, 1.0, 1.0, 1.06, 1.06, 1.06], False),
        ([1.06, 1.06, 1.06, 1.0, 1.0, 1.0], False),
        ([0.0] * 6, True),  # hash has none
    ],
)
def test_a_balance_loss_is_stable_when_its_mean_hardly_changes(losses: list[float], stable: bool) -> None:
    assert is_stable(losses, window=3, change=0.05) == stable


def verdict(balance_loss: float = 1.0, updates: bool = True) -> Any:
    return SimpleNamespace(balance_loss=balance_loss, updates=updates)


def watched(profile: RunProfile, step: int, given: Any) -> None:
    """A step in which a recorder, if there is one, saw nothing but its number."""
    with profile.watching(loaded()):
        pass
    if profile._recorder is not None:
        profile._recorder = SimpleNamespace(decisions=lambda: f"step {step}")  # type: ignore[assignment]
    profile.add(step, given)


def loaded() -> Any:
    layers = [SimpleNamespace(router=torch.nn.Identity())]
    return SimpleNamespace(moe_layers=[0], served_moe_layers=[0], layers=layers, router=SimpleNamespace(kind="topk"))


def test_nothing_is_recorded_before_the_loss_is_stable_nor_of_refused_steps_and_what_was_undone_is_forgotten() -> None:
    profile = RunProfile(ProfileConfig(record=True, window=2, stable_change=0.01, last_steps=3), ranks=2)
    assert profile.step_tokens == 2731  # 16384 / (3 x 2), rounded up

    def steps() -> list[int]:
        return [step for step, _ in profile._decisions]

    for step, loss in enumerate((3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0), 1):
        watched(profile, step, verdict(loss))
    assert steps() == [7, 8]  # stable after the sixth, and so it stays
    watched(profile, 9, verdict(updates=False))
    watched(profile, 10, verdict())
    watched(profile, 11, verdict())
    assert steps() == [8, 10, 11] and profile.missing("RUN") == ""
    watched(profile, 9, verdict())  # the run went back to step 8
    assert steps() == [9]


def test_a_missing_profile_is_said_to_be_missing() -> None:
    profile = RunProfile(ProfileConfig(record=True, window=4), ranks=1)
    for step, loss in enumerate((3.0, 2.0, 1.0), 1):
        watched(profile, step, verdict(loss))
    said = profile.missing("runs/a")
    assert "3 of the 8 steps" in said and "tools/record_routing.py runs/a" in said and "\n" not in said
    assert RunProfile(ProfileConfig(), ranks=1).missing("runs/a") == ""


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "expert_choice"}, "a token has no choices there"),
        ({"capacity_factor": 1.25}, "capacity_factor=1.25: capacity takes choices away"),
        ({"dense_layers_first": 2}, "none of 2 layers is MoE"),
    ],
)
def test_what_can_not_be_recorded_is_refused_before_a_rank_starts(folder: Path, settings: dict[str, Any], problem: str) -> None:
    config = config_of(folder, "refused", **settings)
    check_config(config, 1)
    with pytest.raises(ValueError, match=problem):
        check_config(replace(config, profile=ProfileConfig(record=True)), 1)
