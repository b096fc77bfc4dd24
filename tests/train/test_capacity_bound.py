"""LocMoE's capacity in runs: one delta in every layout, of whole steps, kept in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.stored import read_tensors
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, write_tokens

BOUND = {
    "dtype": "float64", "kind": "locmoe", "top_k": 1, "renormalize": False, "capacity_factor": 1.25, "capacity_bound": "locmoe",
    "capacity_delta": "quantile", "capacity_quantile": 0.9, "group": "sequence", "interval": 2, "steps": 4,
}  # fmt: skip


def run(folder: Path, name: str, settings: dict[str, Any], start: str = "") -> list[dict[str, Any]]:
    config = config_of(folder, name, **(BOUND | settings))
    point = checkpoint(config_of(folder, start, **BOUND), 2) if start else None
    return records_of(config, point).records


def deltas(folder: Path, name: str, step: int = 4) -> list[torch.Tensor]:
    tensors = read_tensors(checkpoint(config_of(folder, name, **BOUND), step))
    return [value for key, value in sorted(tensors.items()) if key.endswith("router.delta")]


@pytest.mark.full
@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_every_layout_has_one_delta_bit_by_bit(tmp_path: Path, ema: float) -> None:
    """Of a step's micro-batches and ranks together, however they are cut; and a run that was resumed is one that was not."""
    write_tokens(tmp_path / "tokens")
    (one,) = run_on_ranks(1, run, tmp_path, "one", {"micro_batch_size": 8, "capacity_ema": ema})
    (cut, *_) = run_on_ranks(4, run, tmp_path, "cut", {"tp": 2, "ep": 2, "micro_batch_size": 1, "capacity_ema": ema})
    (resumed,) = run_on_ranks(1, run, tmp_path, "resumed", {"micro_batch_size": 8, "capacity_ema": ema}, "one")
    assert [r["loss"] for r in cut] == pytest.approx([r["loss"] for r in one], rel=1e-11)
    assert [r["dropped_fraction"] for r in cut] == [r["dropped_fraction"] for r in one]
    assert [r["loss"] for r in resumed] == [r["loss"] for r in one[2:]]
    assert same_checkpoints(*(checkpoint(config_of(tmp_path, name, **BOUND), 4) for name in ("one", "resumed"))) == []
    first = deltas(tmp_path, "one")
    assert len(first) == 2 and all(0 < value.item() < 1 for value in first)
    for name in ("cut", "resumed"):
        assert all(map(torch.equal, first, deltas(tmp_path, name)))
    assert all(map(torch.equal, first, deltas(tmp_path, "one", 2))) == (ema == 0)  # frozen after the first step
