"""Runs of a pipeline: the records, validation and checkpoints of one process, and a way from any layout to any other."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.config import PretrainConfig
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, write_tokens

RUN: dict[str, Any] = {
    "num_layers": 4,
    "dense_layers_first": 1,
    "steps": 6,
    "interval": 2,
    "eval_interval": 3,
    "dtype": "float64",
}
LEFT_OUT = (  # clocks, and what one of several runs alone has
    "changed_settings",
    "step_s",
    "tokens_per_s",
    "mfu",
    "memory_gb",
    "token_bytes_between_nodes",
    "token_bytes_within_nodes",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def jobs(configs: dict[str, tuple[PretrainConfig, Path | None]]) -> dict[str, list[dict[str, Any]]]:
    """Runs one after the other, each from its checkpoint; their records."""
    return {name: records_of(config, point).records for name, (config, point) in configs.items()}


def far(records: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    """Where records differ by more than rounding."""
    assert len(records) == len(wanted)
    out = []
    for own, other in zip(records, wanted, strict=True):
        assert [k for k in own if k not in LEFT_OUT] == [k for k in other if k not in LEFT_OUT]
        for key in own.keys() - set(LEFT_OUT):
            a, b = own[key], other[key]
            same = math.isclose(a, b, rel_tol=1e-10) if isinstance(a, float) and isinstance(b, float) else a == b
            if isinstance(a, list) and len(a) == len(b) and all(isinstance(v, float) for v in a):
                same = all(math.isclose(x, y, rel_tol=1e-10) for x, y in zip(a, b, strict=True))
            out += [] if same else [f"step {own['step']}: {key} {a} {b}"]
    return out


def with_schedule(config: PretrainConfig, name: str) -> PretrainConfig:
    return replace(config, strategy=replace(config.strategy, pipeline=name))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="1f1b"),
        pytest.param({"tie_embeddings": False, "zero": 1, "pp_chunks": 2, "mtp_layers": 1}, id="zbv", marks=pytest.mark.full),
    ],
)
def test_two_stages_run_as_one_process_and_take_up_its_checkpoints(settings: dict[str, Any], tmp_path: Path) -> None:
    model = {key: value for key, value in settings.items() if key in ("tie_embeddings", "mtp_layers")}
    write_tokens(tmp_path / "tokens")
    alone = config_of(tmp_path, "alone", **RUN, **model)
    whole = records_of(alone).records
    name = "zbv" if settings.get("pp_chunks") == 2 else "1f1b"
    pipeline = {run: with_schedule(config_of(tmp_path, run, **RUN, **settings, pp=2), name) for run in ("pp", "on", "back")}
    experts = config_of(tmp_path, "ep", **RUN, **model, ep=2)
    point = checkpoint(alone, 2)
    begun = {
        "pp": (pipeline["pp"], None),
        "on": (pipeline["on"], point),  # from one process to two stages
        "back": (pipeline["back"], checkpoint(pipeline["pp"], 2)),  # the same layout again
        "ep": (experts, checkpoint(pipeline["pp"], 2)),  # from two stages to two expert-parallel ranks
    }
    first, second = run_on_ranks(2, jobs, begun)
    for of_rank in (first, second):
        assert far(of_rank["pp"], whole) == []
        assert all(far(of_rank[run], whole[2:]) == [] for run in ("on", "back", "ep"))
    assert same_checkpoints(checkpoint(pipeline["pp"], 6), checkpoint(pipeline["back"], 6)) == []
    shutil.rmtree(tmp_path)
