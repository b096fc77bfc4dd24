"""Rows of the star test for pipelines, on threads of one process, which take no time to start."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from types import MappingProxyType
from typing import Any

import torch

from megalina.blocks.pipelined import pipelined
from megalina.config import OptimConfig, PretrainConfig
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.validate import check_config
from megalina.verify import layouts
from megalina.verify.compare import compare
from megalina.verify.layouts import Choices, Row, Values, axes_of_pipelines, fits, pairwise_of, row_of, runs
from megalina.verify.on_ranks import layout_config, record_rank, together
from megalina.verify.recording import Layout, Recording
from megalina.verify.reference import record
from megalina.verify.start import random_batches
from tests.parallel.thread_ranks import meshes, on_threads
from tests.verify.cases import MODELS, ROUTERS, choices_of, config_with, strategy

RANKS, MOST_RANKS = 4, 8  # what models are shrunk for; of a row, where both tp and ep are 2 at most
OPTIMIZERS = {
    "sgd": OptimConfig(name="sgd", lr=0.1),
    "adamw": OptimConfig(name="adamw", lr=1e-3),
    "muon": OptimConfig(name="muon", lr=1e-3),
}
INSIDE: dict[str, tuple[dict[str, Any], ...]] = {  # strategies that cut cells, or weights' gradients come later, with numbers
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
SIZES = ("place", "context", "pp")
UNTIED = ("plain", "ahead")  # of which there is one with an output matrix of its own, too


def choices() -> Choices:
    """Every model, tied and untied, with every router and optimizer, every strategy that pipelines have, every schedule."""
    found = choices_of(RANKS)
    untied = {f"{name}, untied": replace(found.models[name], tie_embeddings=False) for name in UNTIED}
    return replace(found, models={**found.models, **untied}, optimizers=OPTIMIZERS)


def options(ranks: int = MOST_RANKS) -> dict[str, Sequence[Any]]:
    found = axes_of_pipelines(choices(), ranks)
    least = {
        "place": [place for place in found["place"] if max(place[1:3]) <= 2],
        "context": [context for context in found["context"] if context[0] <= 2],
        "pp": [pp for pp in found["pp"] if pp <= 4],
    }
    return found | least


@cache
def every_pair() -> list[Row]:
    """Rows in which all pairs of choices occur that megalina accepts together."""
    return pairwise_of(choices(), options())


def every_choice(ranks: int) -> list[Row]:
    """Few rows in which each choice occurs: all axes take turns, and what megalina refuses is given the next place."""
    own, of = choices(), options(ranks)
    turns = {axis: itertools.cycle(values) for axis, values in of.items() if axis not in SIZES}
    every_size = (dict(zip(SIZES, of_sizes, strict=True)) for of_sizes in itertools.product(*(of[axis] for axis in SIZES)))
    sizes = list(filter(fits, every_size))
    rows: list[Row] = []
    for turn in range(max(map(len, of.values()))):
        values = {axis: next(values) for axis, values in turns.items()}
        row = next(_rows_with(own, values, sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]), None)
        rows += [row] if row is not None else []
    return rows


def _rows_with(own: Choices, values: Values, sizes: Sequence[Values]) -> Iterator[Row]:
    """Other micro-batches, ZeRO-1, no capacity, single rows, where the sizes, the strategy or the router have none other."""
    for dispatch, size in itertools.product(dict.fromkeys((values["dispatch"], "rows")), sizes):
        for micro_batch in (values["micro_batch"], 1, 2, 4):
            for less in ({}, {"capacity": False}, {"zero": (1, 0.0)}, {"capacity": False, "zero": (1, 0.0)}):
                row = {**values, **size, "dispatch": dispatch, "micro_batch": micro_batch, **less}
                if fits(row) and runs(own, row_of(own, row)):
                    yield row_of(own, row)


def differences(rows: Sequence[Row], *, steps: int) -> list[str]:
    """Of rows on threads: a line for each that differs from one process."""
    own = choices()
    found = ((row, difference(layouts.config_of(own, row), row.layout, steps=steps)) for row in rows)
    return [f"{row}: {first}" for row, first in found if first]


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
    config = config_with(ranks=RANKS, model=model, router=router)
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
        packing=int(config.strategy.packing) if config.strategy.packing.isdecimal() else 1,  # auto begins with 1
    )
    batches, cpu = random_batches(config, steps), torch.device("cpu")
    held = on_threads(layout.world, lambda rank: record_rank(config, layout, batches, of_ranks[rank], device=cpu, plant=plant))
    return together(config, layout, batches, held)


def difference(config: PretrainConfig, layout: Layout, *, steps: int = 1) -> str:
    """The first quantity that is not one process's; "" where all are."""
    check_config(config, layout.world)
    reference = record(config, random_batches(config, steps))
    return str(compare(reference, recorded(config, layout, steps)).first or "")


def inside_of_cells(schedule: str, number: int, *, seed: int) -> Iterator[tuple[Any, ...]]:
    """So many rows of a schedule with strategies of INSIDE, always the same ones: configuration, layout, and what they are."""
    random, chunks_of = Random(f"{schedule} {seed}"), [SCHEDULES[schedule].chunks] if SCHEDULES[schedule].chunks else [1, 2]
    found = 0
    while found < number:
        ranks, tp, ep, edp = random.choice((2, 4)), random.choice([1, 1, 2]), random.choice([1, 1, 2]), random.choice([1, 1, 2])
        chunks, cp = random.choice(chunks_of), random.choice([1, 1, 2])
        layout = Layout(
            ranks * tp * ep * edp * cp,
            tp,
            ep,
            sequence=random.choice([True, False]) if tp > 1 else True,
            zero=random.choice([0, 1]),
            micro_batch=random.choice([2, 4]),
            recompute=random.choice(["none", "selective", "full"]),
            piece_mb=random.choice([0.0, 0.002]),
            strategy=random.choice(tuple(INSIDE)),
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
            "numbers": random.choice(INSIDE[layout.strategy]),
        }
        config = config_of(layout, **settings)
        try:
            if layout.world > MOST_RANKS:
                continue
            check_config(config, layout.world)
        except ValueError:
            continue
        found += 1
        yield config, layout, f"{layout}, {layout.strategy}, {settings}"
