"""Every plant, on real ranks: it is found and named by the numbers alone, on rows of several kinds; without one nothing is."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megalina.config import ModelConfig, OptimConfig, ParallelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.verify.diagnosis import diagnose
from megalina.verify.on_ranks import Pool, layout_config
from megalina.verify.plants import PLANTS
from megalina.verify.recording import SEQUENCES, Layout, Recording
from megalina.verify.reference import detail, record, reference_config
from megalina.verify.start import random_batches
from tests.verify.cases import strategy

WORLD = 4
ORDER = Path(__file__).parent / "expert_order.json"  # of the experts on the ranks
MODELS = {
    "GPT-2": {"tie_embeddings": False, "positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu"},
    "dropout": {"dropout": 0.2, "bias": True, "dense_layers_first": 1, "shared_d_ff": 12},
    "modern": {"qk_norm": "head", "num_heads": 8, "head_dim": 8},
    "sinks": {"qk_norm": "projection", "attention_sinks": True, "window": 4, "full_attention_every": 2, "dropout": 0.2},
    "latent": {
        "attention": "mla",
        "q_lora_rank": 10,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
    "ahead": {"num_layers": 1, "mtp_layers": 2},
}
QK_CLIPS = {"latent, ahead": 0.02}  # below its largest logits
MODELS["latent, ahead"] = {**MODELS["latent"], "num_layers": 1, "mtp_layers": 1}
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "capacity": {"group": "micro_batch", "capacity_factor": 0.8, "renormalize": False},
    "sigmoid": {"kind": "sigmoid", "bias_update_rate": 0.01, "group": "micro_batch"},
    "global": {"group": "global"},
    "dense": {
        "kind": "dense", "renormalize": False, "balance_loss": 0.0, "group": "micro_batch", "mutual_information_loss": 0.1,
    },
    "local": {"kind": "locmoe", "temperature": 0.1, "locality_loss": 0.1, "locality_nodes": 2},
    "groups": {"kind": "group_limited", "num_groups": 2, "top_k": 1, "bias_update_rate": 0.01},
    "groups of best": {"kind": "group_limited_softmax", "num_groups": 2, "top_k": 1, "renormalize": False},
    "local topk": {"group": "micro_batch", "locality_loss": 0.1, "locality_nodes": 2},
    "replayed": {"renormalize": False, "replay": "drawn"},
    "replayed, placed": {"kind": "sigmoid", "bias_update_rate": 0.01, "group": "micro_batch", "replay": "drawn"},
}  # fmt: skip
CLEAN = (0,)  # a row that `make test` runs without a plant too: of the rest test_layouts.py has the like
ROWS = [  # no two axes of a layout need have different sizes: causes that look alike there must still be told apart
    ("GPT-2", "topk", "sgd", Layout(WORLD, tp=2, ep=2, micro_batch=1)),
    ("dropout", "capacity", "adamw", Layout(WORLD, tp=2, ep=1, zero=1, micro_batch=2, sequence=False, piece_mb=0.002)),
    ("modern", "sigmoid", "adamw", Layout(WORLD, tp=2, ep=2, micro_batch=2, recompute="full")),
    ("modern", "topk", "adamw", Layout(WORLD, tp=1, ep=2, zero=1, micro_batch=1)),
    ("GPT-2", "capacity", "sgd", Layout(WORLD, tp=1, ep=2, micro_batch=1, recompute="selective")),
    ("dropout", "global", "adamw", Layout(WORLD, tp=4, ep=1, micro_batch=8)),
    ("GPT-2", "topk", "adamw", Layout(WORLD, tp=2, ep=2, micro_batch=2, strategy="lancet")),
    ("modern", "sigmoid", "sgd", Layout(WORLD, tp=1, ep=4, micro_batch=2, recompute="full", strategy="lancet")),
    ("modern", "capacity", "adamw", Layout(WORLD, tp=1, ep=2, micro_batch=2, strategy="lancet")),
    ("dropout", "dense", "sgd", Layout(WORLD, tp=2, ep=2, micro_batch=2)),
    ("GPT-2", "dense", "adamw", Layout(WORLD, tp=2, ep=1, micro_batch=4, zero=1, recompute="full")),
    ("modern", "local", "adamw", Layout(WORLD, tp=1, ep=2, zero=1, micro_batch=1)),
    ("dropout", "local topk", "sgd", Layout(WORLD, tp=2, ep=2, micro_batch=2)),
    ("sinks", "topk", "sgd", Layout(WORLD, tp=2, ep=2, micro_batch=2)),
    ("latent", "topk", "sgd", Layout(WORLD, tp=2, ep=1, micro_batch=4)),
    ("ahead", "groups", "adamw", Layout(WORLD, tp=2, ep=2, micro_batch=2, recompute="full")),
    ("ahead", "groups of best", "sgd", Layout(WORLD, tp=1, ep=2, zero=1, micro_batch=1)),
    ("modern", "topk", "muon", Layout(WORLD, tp=1, ep=2, micro_batch=2)),
    ("modern", "topk", "muon", Layout(WORLD, tp=1, ep=2, zero=1, micro_batch=2)),
    ("GPT-2", "topk", "muon_clip", Layout(WORLD, tp=2, ep=1, micro_batch=4)),
    ("latent, ahead", "topk", "muon_clip", Layout(WORLD, tp=1, ep=2, micro_batch=2)),
    ("modern", "replayed", "adamw", Layout(WORLD, tp=2, ep=2, micro_batch=2, recompute="full")),
    ("modern", "replayed, placed", "sgd", Layout(WORLD, tp=1, ep=4, zero=1, micro_batch=1)),
    ("modern", "capacity", "sgd", Layout(WORLD, tp=1, ep=2, micro_batch=2, cp=2)),
    ("latent", "topk", "sgd", Layout(WORLD, tp=2, ep=1, micro_batch=4, cp=2, cp_kind="all_to_all")),
    ("GPT-2", "topk", "muon_clip", Layout(WORLD, tp=1, ep=1, micro_batch=4, cp=4)),
    ("modern", "topk", "adamw", Layout(WORLD, tp=1, ep=2, micro_batch=1, pp=2, pipeline="zb_h1")),
    ("modern", "topk", "adamw", Layout(WORLD, tp=1, ep=2, micro_batch=1, reduce="by_node")),
    ("GPT-2", "capacity", "sgd", Layout(WORLD, tp=1, ep=1, micro_batch=2, reduce="by_node")),
    ("modern", "topk", "adamw", Layout(WORLD, tp=1, ep=2, micro_batch=2, dispatch="once_per_rank")),
    ("GPT-2", "topk", "sgd", Layout(WORLD, tp=1, ep=4, micro_batch=2, dispatch="once_per_node")),
    ("modern", "topk", "sgd", Layout(WORLD, tp=1, ep=1, micro_batch=1, pp=4, pipeline="zb_h1", stages="E|t|t|L")),
]


def config_of(model: str, router: str, optimizer: str, layout: Layout) -> PretrainConfig:
    lancet = layout.strategy == "lancet"
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 4, "num_experts": 4, "d_ff": 16, "dense_d_ff": 24}
    config = PretrainConfig(
        model=ModelConfig(**(sizes | {"vocab_size": 200} | MODELS[model])),  # type: ignore[arg-type]
        router=RouterConfig(**({"balance_loss": 0.1, "z_loss": 0.01} | ROUTERS[router])),  # type: ignore[arg-type]
        optim=OptimConfig(
            name=optimizer, lr=0.1 if optimizer == "sgd" else 1e-3, qk_clip=0.02 if model == "latent, ahead" else 0.5
        ),
        strategy=replace(strategy(layout.strategy), partition="2" if lancet and router == "capacity" else "none"),
        parallel=ParallelConfig(placement=str(ORDER) if router == "replayed, placed" else ""),
        train=TrainConfig(global_batch_size=SEQUENCES, seq_len=8, dtype="float64"),
    )
    return layout_config(config, layout)


CONFIGS = [config_of(*row) for row in ROWS]


@cache
def reference_of(row: int) -> Recording:
    layout, config = ROWS[row][-1], CONFIGS[row]
    out = record(reference_config(config), random_batches(config, 1))
    detail(out, layout)
    return out


def rows_of(plant: str) -> list[int]:
    """The rows in which a plant acts."""
    return [i for i, (*_, layout) in enumerate(ROWS) if PLANTS[plant].applies(layout, CONFIGS[i])]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool


def named(pool: Pool, row: int, plant: str = "") -> str:
    *_, layout = ROWS[row]
    config = CONFIGS[row]
    return diagnose(reference_of(row), pool.record(config, layout, random_batches(config, 1), plant)).named


def test_every_plant_acts_somewhere() -> None:
    assert [name for name in PLANTS if not rows_of(name)] == []


def test_a_partition_that_is_yet_to_be_found_cuts_nothing() -> None:
    """A verification walks the list that a run begins with."""
    row = next(i for i, row in enumerate(ROWS) if row[:2] == ("modern", "capacity"))
    config, layout = CONFIGS[row], ROWS[row][-1]
    auto, none = (replace(config, strategy=replace(config.strategy, partition=text)) for text in ("auto", "none"))
    for plant in PLANTS.values():
        assert plant.applies(layout, auto) == plant.applies(layout, none)
    assert PLANTS["capacity_not_passed"].applies(layout, config) and not PLANTS["capacity_not_passed"].applies(layout, auto)


@pytest.mark.parametrize("row", [row if row in CLEAN else pytest.param(row, marks=pytest.mark.full) for row in range(len(ROWS))])
def test_without_a_plant_nothing_is_named(pool: Pool, row: int) -> None:
    assert named(pool, row) == ""


@pytest.mark.sampled(15)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_plant_is_found_and_named(pool: Pool, plant: str) -> None:
    assert named(pool, rows_of(plant)[0], plant) == plant


@pytest.mark.full
@pytest.mark.parametrize("plant", [plant for plant in PLANTS if len(rows_of(plant)) > 1])
def test_a_plant_is_found_and_named_in_another_row(pool: Pool, plant: str) -> None:
    assert named(pool, rows_of(plant)[1], plant) == plant
