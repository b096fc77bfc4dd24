"""A run with Muon: what it logs, saves and goes on from, in one layout and from layout to layout; packings in between."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.stored import read_tensors
from megalina.config import OptimConfig, PretrainConfig, StrategyConfig
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, start, write_tokens
from tests.train.test_trainer import _process_state  # noqa: F401  handlers of signals come back

SAVED, STEPS = 2, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "mixed": {"tp": 2, "ep": 2, "zero": 1},
    "data": {"ep": 2, "zero": 1, "micro_batch_size": 1},
}
TOLERANCE = 1e-10  # of a loss, relative


def muon_config(folder: Path, run: str, **settings: Any) -> PretrainConfig:
    config = config_of(folder, run, **{"dtype": "float64", "interval": SAVED, "steps": STEPS, "bias": True} | settings)
    config.optim = OptimConfig(name="muon_clip", lr=3e-3, clip_norm=0.2, qk_clip=0.02)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("muon")
    write_tokens(path / "tokens")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    return records_of(muon_config(folder, "one")).records


def test_it_logs_logits_and_heads_and_goes_on_to_the_last_bit(folder: Path, whole: list[dict[str, Any]]) -> None:
    assert all(r["max_logit"] > 0 for r in whole) and any(r["clipped_heads"] > 0 for r in whole)
    json.dumps(whole)
    again = records_of(muon_config(folder, "again"), checkpoint(muon_config(folder, "one"), SAVED)).records
    keys = ("loss", "grad_norm", "max_logit", "clipped_heads")
    assert [[r[k] for k in keys] for r in again] == [[r[k] for k in keys] for r in whole[SAVED:]]
    assert same_checkpoints(*(checkpoint(muon_config(folder, run), STEPS) for run in ("one", "again"))) == []


def test_a_checkpoint_has_a_momentum_of_matrices_and_moments_of_the_rest(folder: Path, whole: list[dict[str, Any]]) -> None:
    assert whole
    tensors = read_tensors(checkpoint(muon_config(folder, "one"), SAVED))
    of = {kind: {name.partition("/")[2] for name in tensors if name.startswith(f"{kind}/")} for kind in ("momentum", "exp_avg")}
    matrices = {f"layers.{i}.{n}" for i in (0, 1) for n in ("attention.q", "attention.k", "attention.v", "attention.proj")}
    matrices |= {f"layers.{i}.experts.{n}" for i in (0, 1) for n in ("w1", "w2")}
    assert of["momentum"] == matrices
    assert of["exp_avg"] == {name.removeprefix("model/") for name in tensors if name.startswith("model/")} - matrices
    assert all(tensors[f"momentum/{name}"].shape == tensors[f"model/{name}"].shape for name in matrices)
    assert all(tensors[f"momentum/{name}"].abs().max() > 0 for name in matrices)


def on_ranks(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        run = start(muon_config(folder, name, **layout), checkpoint(muon_config(folder, "one"), SAVED))
        run.state.save()  # as it was read: nothing may be lost on the way through a layout
        run.loop()
        out[name] = run.tracker.of("loss")  # type: ignore[attr-defined]
    config = muon_config(folder, "packed", ep=4, zero=1, dtype="bfloat16", micro_batch_size=1)
    config.strategy = StrategyConfig(name="lina", packing="auto", yields=True, newton_schulz_after=2)
    run = start(config)
    run.runner.compute(1)
    before = {name: [part.local.clone() for part in parts] for name, parts in run.state.tensors().items()}
    for packing in (2, 4, 1):
        run.runner.repack(packing)
    after = run.state.tensors()
    out["bits"] = all(torch.equal(a, b.local) for n in before for a, b in zip(before[n], after[n], strict=True))
    run.runner.repack(2)
    out["goes on"] = run.runner.compute(2)[0].finite
    return out


@pytest.mark.full
def test_a_run_goes_on_in_other_layouts_and_packings_lose_no_bit(folder: Path, whole: list[dict[str, Any]]) -> None:
    losses = [r["loss"] for r in whole[SAVED:]]
    ranks = run_on_ranks(4, on_ranks, folder)
    assert all(rank == ranks[0] for rank in ranks)
    for name in LAYOUTS:
        assert ranks[0][name] == pytest.approx(losses, rel=TOLERANCE, abs=0)
        one, many = (checkpoint(muon_config(folder, run), SAVED) for run in ("one", name))
        assert same_checkpoints(one, many) == []
    assert ranks[0]["bits"] and ranks[0]["goes on"]
