"""Rows of the star test for pipelines, on threads of one process, which take no time to start."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any

import torch

from megalina.blocks.pipelined import pipelined
from megalina.config import OptimConfig, PretrainConfig
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.validate import check_config
from megalina.verify.compare import compare
from megalina.verify.on_ranks import layout_config, record_rank, together
from megalina.verify.recording import Layout, Recording
from megalina.verify.reference import record
from megalina.verify.start import random_batches
from tests.parallel.thread_ranks import meshes, on_threads
from tests.verify.cases import MODELS, ROUTERS, config_with, strategy

OPTIMIZERS = {
    "sgd": OptimConfig(name="sgd", lr=0.1),
    "adamw": OptimConfig(name="adamw", lr=1e-3),
    "muon": OptimConfig(name="muon", lr=1e-3),
}
OUTSIDE = (
    "eager",
    "ddp",
    "serial",
    "fixed",
    "priority_partition",
    "lina_nopack",
)  # strategies that cut no cell and defer nothing
INSIDE: dict[str, tuple[dict[str, Any], ...]] = {  # those that do, with numbers
    "flow": (
        {},
        {"parts": 4},
        {"late_layers": 1},
        {"chunks": "2", "yields": True},
        {"deferred_weights": "all", "join_weights": True},
        {"deferred_weights": "experts", "late_layers": 1},
        {"packing": "2"},
    ),
    "pair": ({}, {"parts": 2}, {"deferred_weights": "all", "yields": True}, {"late_layers": 1, "chunks": "2"}, {"packing": "2"}),
    "lina": ({"packing": "1"}, {"packing": "2"}),
    "lina_zero": ({}, {"deferred_weights": "all"}, {"packing": "2", "chunks": "2"}),
    "lancet": (
        {},
        {"deferred_mb": 0.01},
        {"deferred_weights": "experts"},
        {"partition": "2", "join_weights": True},
        {"partition": "2", "partition_backward": "mirrored"},
    ),
}
CHUNKS = {name: [schedule.chunks] if schedule.chunks else [1, 2] for name, schedule in SCHEDULES.items()}


def config_of(
    layout: Layout,
    *,
    model: str = "plain",
    router: str = "topk",
    optimizer: str = "adamw",
    numbers: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> PretrainConfig:
    """`numbers`: of the strategy; `settings`: of the model."""
    config = config_with(ranks=4, model=model, router=router)
    config = replace(
        config,
        model=replace(config.model, **settings),
        optim=OPTIMIZERS[optimizer],
        strategy=replace(strategy(layout.strategy), **numbers),
    )
    return layout_config(config, layout)


def recorded(config: PretrainConfig, layout: Layout, steps: int, plant: str = "") -> Recording:
    across = pipelined(config, layout.world).across if layout.pp > 1 else {}
    of_ranks = meshes(
        layout.world,
        tp=layout.tp,
        ep=layout.ep,
        cp=layout.cp,
        pp=layout.pp,
        across=across,
        packing=int(config.strategy.packing),
    )
    batches, cpu = random_batches(config, steps), torch.device("cpu")
    held = on_threads(layout.world, lambda rank: record_rank(config, layout, batches, of_ranks[rank], device=cpu, plant=plant))
    return together(config, layout, batches, held)


def difference(config: PretrainConfig, layout: Layout, *, steps: int = 1) -> str:
    """The first quantity that is not one process's; "" where all are."""
    check_config(config, layout.world)
    reference = record(config, random_batches(config, steps))
    return str(compare(reference, recorded(config, layout, steps)).first or "")


def drawn(
    schedule: str,
    number: int,
    *,
    seed: int,
    pp: tuple[int, ...] = (2, 4),
    most_ranks: int = 8,
    strategies: Sequence[str] = OUTSIDE,
) -> Iterator[tuple[Any, ...]]:
    """So many rows of a schedule that megalina accepts, always the same ones: configuration, layout, and what they are."""
    random = Random(f"{schedule} {seed}")
    found = 0
    while found < number:
        ranks, tp, ep, edp = random.choice(pp), random.choice([1, 1, 2]), random.choice([1, 1, 2]), random.choice([1, 1, 2])
        chunks, cp = random.choice(CHUNKS[schedule]), random.choice([1, 1, 2])
        layout = Layout(
            ranks * tp * ep * edp * cp,
            tp,
            ep,
            sequence=random.choice([True, False]) if tp > 1 else True,
            zero=random.choice([0, 1]),
            micro_batch=random.choice([1, 2] if strategies == OUTSIDE else [2, 4]),
            recompute=random.choice(["none", "selective", "full"]),
            piece_mb=random.choice([0.0, 0.002]),
            strategy=random.choice(strategies),
            cp=cp,
            cp_kind=random.choice(["all_gather", "all_to_all"]) if cp > 1 else "all_gather",
            pp=ranks,
            chunks=chunks,
            pipeline=schedule,
        )
        settings: dict[str, Any] = {
            "model": random.choice(list(MODELS)),
            "router": random.choice([name for name in ROUTERS if name != "global"]),
            "optimizer": random.choice(list(OPTIMIZERS)),
            "num_layers": ranks * chunks + random.choice([0, 1]),
            "tie_embeddings": random.choice([True, False]),
        }
        if layout.strategy in INSIDE:
            settings["numbers"] = random.choice(INSIDE[layout.strategy])
        config = config_of(layout, **settings)
        try:
            if layout.world > most_ranks:
                continue
            check_config(config, layout.world)
        except ValueError:
            continue
        found += 1
        yield config, layout, f"{layout}, {layout.strategy}, {settings}"
