"""Runs of a pipeline: the records, validation and checkpoints of one process, and a way from any layout to any other."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.config import PretrainConfig, StrategyConfig
from megalina.parallel.plan_file import with_plan
from megalina.step.plan import Plan
from megalina.validate import check_config
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, start, write_tokens

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
    "rank_load_max_over_mean",
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


def planned(config: PretrainConfig) -> tuple[list[float], Plan]:
    """Losses of a run, and the plan that it has in the end."""
    run = start(config)
    run.loop()
    losses: list[float] = run.tracker.of("loss")  # type: ignore[union-attr]
    return losses, run.built.trainable.plan


def with_strategy(config: PretrainConfig, **settings: Any) -> PretrainConfig:
    return replace(config, strategy=StrategyConfig(**settings))


UNLIKE: dict[str, Any] = {  # the first stage is dense
    "num_layers": 4, "dense_layers_first": 2, "dtype": "float64", "pp": 2, "pp_layout": "Ett|ttL",
}  # fmt: skip


def measured(folder: Path) -> dict[str, tuple[list[float], Plan]]:
    configs = {
        "eager": config_of(folder, "eager", **UNLIKE, steps=8),
        "lancet": with_strategy(config_of(folder, "lancet", **UNLIKE, steps=8), name="lancet", deferred_weights="all"),
        "windows": with_strategy(config_of(folder, "windows", **UNLIKE, steps=8), name="flow", parts=2, windows="auto"),
    }
    return {name: planned(config) for name, config in configs.items()}


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
def test_what_is_measured_is_agreed_by_ranks_that_do_different_things(world: int, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found = run_on_ranks(world, measured, tmp_path)
    for of_rank in found:
        assert of_rank == found[0]
        assert all(losses == pytest.approx(of_rank["eager"][0], rel=1e-10) for losses, _ in of_rank.values())
    kinds = {kind for kind, _ in found[0]["lancet"][1].times_us}
    assert {"F:embed", "W:mlp", "W:experts"} <= kinds  # of both stages
    assert found[0]["windows"][1].measured_at > 0


def repacked(folder: Path, switches: dict[int, int]) -> list[tuple[float, float]]:
    """Losses and norms; after this step: this packing."""
    settings: dict[str, Any] = {"dtype": "float64", "num_layers": 4, "ep": 2, "pp": 2, "pp_layout": "Ett|ttL", "zero": 1}
    config = config_of(folder, f"packed {len(switches)}", steps=6, **settings)
    run = start(with_strategy(config, name="lina", packing="auto", yields=True, partition_bytes="16384", pipeline="zb_h1"))
    out = []
    for step in range(1, 7):
        result, _ = run.runner.compute(step)
        out.append((result.loss, result.grad_norm))
        if step in switches:
            assert run.runner.repack(switches[step]) > 0 and run.built.mesh.packing == switches[step]
    run.runner.close()
    return out


def packed_runs(folder: Path) -> tuple[list[tuple[float, float]], ...]:
    return repacked(folder, {}), repacked(folder, {2: 2, 4: 1})


@pytest.mark.full
def test_experts_are_packed_inside_of_stages_between_two_steps(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    for plain, switched in run_on_ranks(4, packed_runs, tmp_path):
        for own, other in zip(switched, plain, strict=True):
            assert own == pytest.approx(other, rel=1e-12)


def chosen(folder: Path, steps: int) -> tuple[list[float], list[float], Plan]:
    settings: dict[str, Any] = {"num_layers": 4, "dtype": "float64", "ep": 2, "pp": 2, "pp_layout": "Ett|ttL", "steps": steps}
    losses, plan = planned(with_strategy(config_of(folder, "auto", **settings), name="auto", packing="auto"))
    return planned(config_of(folder, "eager", **settings))[0], losses, plan


@pytest.mark.full
def test_measured_steps_choose_a_plan_for_all_stages(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found = run_on_ranks(4, chosen, tmp_path, 100, time_limit_s=600)
    for eager, losses, plan in found:
        assert plan == found[0][2] and losses == pytest.approx(eager, rel=1e-9)
    settings: dict[str, Any] = {"num_layers": 4, "dtype": "float64", "ep": 2, "pp": 2, "pp_layout": "Ett|ttL", "steps": 100}
    config = with_strategy(config_of(tmp_path, "again", **settings), name="auto")
    given = with_plan(replace(config, strategy=replace(config.strategy, plan=str(tmp_path / "auto" / "plan.json"))), 4)
    assert given.strategy.name == found[0][2].strategy
    check_config(given, 4)
    other = replace(config, strategy=replace(config.strategy, plan=str(tmp_path / "auto" / "plan.json"), pipeline="gpipe"))
    with pytest.raises(ValueError, match="strategy.pipeline is 1f1b there and gpipe here"):
        with_plan(other, 4)
