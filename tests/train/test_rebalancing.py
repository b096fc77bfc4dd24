"""Experts that change ranks in the middle of a run change no number, and make loads even."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.files import read_values
from megalina.checkpoint.stored import read_tensors
from megalina.comm.slice import Slice
from megalina.config import PretrainConfig, StrategyConfig
from megalina.train.trainer import Trainer
from megalina.validate import check_config
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, start, write_tokens

STEPS = 6
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, settings
    "plain": (2, {"ep": 2}),
    "zero": (4, {"ep": 2, "zero": 1, "router": "sigmoid"}),
    "zero in a late gather": (4, {"ep": 2, "zero": 1, "strategy": "lina_zero"}),
    "tensors": (4, {"ep": 2, "tp": 2, "recompute": "full", "shared_d_ff": 16}),
    "stages": (4, {"ep": 2, "pp": 2}),
    "muon": (4, {"ep": 2, "optimizer": "muon", "zero": 1}),
}
FULL = ("zero", "zero in a late gather", "tensors", "muon")  # of `make test-full`


def run_config(folder: Path, run: str, *, interval: int, **settings: Any) -> PretrainConfig:
    """Eight experts, of which tokens choose some much more often: their loads are not balanced."""
    strategy = settings.pop("strategy", "lina")
    router, optimizer = settings.pop("router", "topk"), settings.pop("optimizer", "adamw")
    own: dict[str, Any] = {"num_experts": 8, "dtype": "float64", "balance_loss": 0.0, "steps": STEPS, "top_k": 1}
    config = config_of(folder, run, **{**own, "rebalance_interval": interval, **settings})
    config.strategy = StrategyConfig(name=strategy)
    config.router.kind, config.optim.name = router, optimizer
    return config


def seen_in(config: PretrainConfig, point: Path | None = None) -> dict[str, list[Any]]:
    records = records_of(config, point)
    keys = ("loss", "grad_norm", "rank_load_max_over_mean", "moved_experts")
    return {key: records.of(key) for key in keys if key in records.records[0]}


def pair(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        kind: seen_in(run_config(folder, f"{name} {kind}", interval=n, **settings)) for kind, n in (("moved", 2), ("still", 0))
    }


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in FULL else n for n in CASES])
def test_a_run_computes_the_same_wherever_its_experts_are(tmp_path: Path, name: str) -> None:
    write_tokens(tmp_path / "tokens")
    ranks, settings = CASES[name]
    found = run_on_ranks(ranks, pair, tmp_path, name, settings)
    for rank in found:
        moved, still = rank["moved"], rank["still"]
        assert moved["loss"] == pytest.approx(still["loss"], rel=1e-12) and len(moved["loss"]) == STEPS
        assert moved["grad_norm"] == pytest.approx(still["grad_norm"], rel=1e-11)
        assert sum(moved["moved_experts"]) > 0 and "moved_experts" not in still
        assert moved == found[0]["moved"]
    ends = [checkpoint(run_config(tmp_path, f"{name} {kind}", interval=0, **settings), STEPS) for kind in ("moved", "still")]
    first, second = (read_tensors(end) for end in ends)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-9, atol=1e-12)


def evened(folder: Path) -> dict[str, list[Any]]:
    return seen_in(run_config(folder, "evened", interval=1, ep=4, lr=1e-6, steps=4, global_batch_size=64, micro_batch_size=16))


def test_loads_get_even(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found, *_ = run_on_ranks(4, evened, tmp_path)
    before, *after = found["rank_load_max_over_mean"]
    assert found["moved_experts"][0] == 0 < found["moved_experts"][1]
    assert before > 1.1 and max(after) < 1 + 0.7 * (before - 1)


def resumed(folder: Path) -> dict[str, Any]:
    """A run that saves after each step; runs that go on from there, in the middle of an interval and at its end."""
    whole = run_config(folder, "whole", interval=2, ep=2)
    whole.checkpoint.interval = 1
    seen = seen_in(whole)
    out = {"moved": seen["moved_experts"]}
    for step in (3, 4):
        config = run_config(folder, f"from {step}", interval=2, ep=2)
        seen_in(config, checkpoint(whole, step))
        out[f"from {step}"] = same_checkpoints(checkpoint(whole, STEPS), checkpoint(config, STEPS))
    return out


def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found, *_ = run_on_ranks(2, resumed, tmp_path)
    assert sum(found["moved"][2:4]) > 0, "nothing had moved before the checkpoints"
    assert found["from 3"] == found["from 4"] == []
    saved = read_values(checkpoint(run_config(tmp_path, "whole", interval=2, ep=2), 4))["rebalancing"]
    assert any(order != list(range(8)) for order in saved["orders"].values()) and sum(map(sum, saved["loads"])) > 0


def moved_bits(folder: Path) -> dict[str, Any]:
    """bfloat16, master weights, ZeRO-1: after a round through other orders every tensor has its bits."""
    run = start(run_config(folder, "bits", interval=100, ep=2, zero=1, dtype="bfloat16"))
    run.runner.compute(1)
    before = {name: [part.local.clone() for part in parts] for name, parts in run.state.tensors().items()}
    rebalancing, random = run.state.rebalancing, torch.Generator().manual_seed(0)
    layers = run.built.trainable.gpt.moe_layers
    sent = []
    for _ in range(3):
        sent.append(rebalancing.move_to({i: tuple(torch.randperm(8, generator=random).tolist()) for i in layers}))
    sent.append(rebalancing.move_to({i: tuple(range(8)) for i in layers}))
    again = rebalancing.move_to({i: tuple(range(8)) for i in layers})
    after = run.state.tensors()
    same = all(torch.equal(a, b.local) for name in before for a, b in zip(before[name], after[name], strict=True))
    return {"same": same, "sent": sent, "again": again, "kinds": {name.split("/")[0] for name in before}}


def test_all_that_an_expert_has_moves_with_its_bits(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    for rank in run_on_ranks(4, moved_bits, tmp_path):
        assert rank["same"] and all(rank["sent"]) and rank["again"] == 0
        assert rank["kinds"] >= {"exp_avg", "exp_avg_sq", "master", "model"}


def without_moments(folder: Path) -> dict[str, Any]:
    """The planted bug: weights move, and their optimizer's state stays."""
    runs = {}
    for kind in ("whole", "weights alone"):
        run = start(run_config(folder, kind, interval=2, ep=2))
        if kind == "weights alone":
            only_weights(run)
        runs[kind] = [run.runner.compute(step)[0].loss for step in range(1, STEPS + 1)]
    return runs


def only_weights(run: Trainer) -> None:
    def tensors() -> Mapping[str, Sequence[Slice]]:
        return {name: parts for name, parts in run.state.tensors().items() if name.startswith("model/")}

    run.state.rebalancing._tensors = tensors


def test_moments_that_stay_behind_would_be_seen(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found, *_ = run_on_ranks(2, without_moments, tmp_path)
    whole, bug = found["whole"], found["weights alone"]
    assert bug[:3] == pytest.approx(whole[:3], rel=1e-12)  # what is moved before step 3 is updated after it
    assert abs(bug[-1] - whole[-1]) > 1e-7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ep": 1}, "rebalance_interval=5 does nothing with parallel.ep=1, where each rank has all experts: set it to 0"),
        ({"ep": 4}, "does nothing where each rank has one of the 4 experts"),
        ({"ep": 2, "placement": "experts.json"}, "both say where experts are: set one of them"),
        ({"ep": 2, "locality_loss": 0.1, "locality_nodes": 2}, "moves experts to other nodes"),
        ({"ep": 2, "kind": "dense", "balance_loss": 0.0, "renormalize": False}, "every expert has all tokens, so loads are even"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    config = config_of(tmp_path, "run", rebalance_interval=5, **settings)
    with pytest.raises(ValueError, match=message):
        check_config(config, 4)
