"""The star test of micro-batches and ranges of layers that are cut into parts: they route as the whole does."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from megalina.verify import layouts
from megalina.verify.layouts import Choices, Row, runs
from megalina.verify.recording import Layout
from megalina.verify.shrink import shrink_router
from tests.verify.cases import choices_of, config_with, strategy
from tests.verify.star import RANKS, differences

# routers whose groups are micro-batches and whose tokens wait for none behind them
PASSED = {
    name: shrink_router(replace(config_with(router=name).router, capacity_factor=capacity, group="micro_batch"), 4, 4)
    for name, capacity in (("topk", 0.0), ("groups of best", 0.8), ("locmoe", 1.0), ("group limited", 1.0), ("hash", 0.8))
}
PASSED["locmoe bound"] = replace(
    PASSED["locmoe"], capacity_bound="locmoe", capacity_delta="quantile", capacity_quantile=0.9, capacity_ema=0.5
)

# where a micro-batch is cut into parts that are one group of the routers: layouts, and into how many parts
CUT = [
    (Layout(1, micro_batch=8, strategy="flow"), 2),
    (Layout(1, micro_batch=4, strategy="flow", recompute="full"), 4),  # two micro-batches a step
    (Layout(2, tp=2, micro_batch=8, strategy="flow", recompute="selective"), 2),
    (Layout(2, tp=2, sequence=False, micro_batch=8, strategy="lina_zero", zero=1), 4),
    (Layout(4, tp=1, ep=4, micro_batch=2, strategy="lina_zero", zero=1, piece_mb=layouts.PIECE_MB), 2),
    (Layout(4, tp=2, ep=2, micro_batch=4, strategy="flow", recompute="full"), 2),
]


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_parts_of_a_micro_batch_route_as_the_whole(world: int) -> None:
    choices = replace(choices_of(RANKS), routers=PASSED)
    models = itertools.cycle(("plain", "dense first, shared experts", "dropout"))
    for parts in (2, 4):
        more = {"chunks": "2", "deferred_weights": "all", "join_weights": True}
        walking = {name: replace(strategy(name), parts=parts, **more) for name in ("flow", "lina_zero")}
        rows = [
            Row(layout, router, config.capacity_factor, model, "adamw")
            for layout, of_parts in CUT
            if (layout.world, of_parts) == (world, parts)
            for (router, config), model in zip(PASSED.items(), models)
        ]
        assert all(row.layout.micro_batches % parts for row in rows), "parts would be whole micro-batches"
        assert differences(replace(choices, strategies=walking), rows, steps=2) == []


# four parts or more, which turn round one after another: halves and quarters of micro-batches, and whole ones
TURNING = [
    (Layout(2, tp=1, ep=2, micro_batch=4, strategy="flow", piece_mb=layouts.PIECE_MB), "none"),
    (Layout(2, tp=2, micro_batch=8, strategy="flow", recompute="full"), "all"),
    (Layout(2, tp=1, ep=2, micro_batch=1, strategy="lina_zero", zero=1), "none"),
    (Layout(4, tp=2, ep=2, micro_batch=4, strategy="flow", recompute="selective", zero=1), "experts"),
    (Layout(4, tp=1, ep=2, cp=2, micro_batch=4, strategy="flow"), "all"),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_parts_that_turn_round_one_after_another_equal_one_process(world: int) -> None:
    """On two ranks with one router, on four with all."""
    choices = choices_of(RANKS)
    routers = list(choices.routers)[: 1 if world == 2 else None]
    models = itertools.cycle(("plain", "dense first, shared experts", "dropout"))
    for deferred in ("none", "experts", "all"):
        more = {"deferred_weights": deferred, "join_weights": deferred == "all"}
        walking = {name: replace(strategy(name), parts=4, **more) for name in ("flow", "lina_zero")}
        own = replace(choices, strategies=walking)
        rows = [
            Row(layout, router, choices.routers[router].capacity_factor, model, "adamw")
            for layout, of_deferred in TURNING
            if (of_deferred, layout.world) == (deferred, world)
            for router, model in zip(routers, models)
        ]
        rows = [row for row in rows if runs(own, row)]
        assert rows or (deferred, world) not in [(how, layout.world) for layout, how in TURNING]
        assert differences(own, rows, steps=1 if world == 2 else 2) == []


# ranges of layers in parts: layouts in which every router runs
PARTITIONED = [
    Layout(1, micro_batch=8, strategy="lancet"),
    Layout(1, micro_batch=4, recompute="full", strategy="lancet"),  # two micro-batches a step
    Layout(2, ep=2, micro_batch=4, strategy="lancet"),
    Layout(2, tp=2, micro_batch=8, strategy="lancet"),
    Layout(2, tp=2, sequence=False, micro_batch=8, strategy="lancet"),
    Layout(4, ep=4, micro_batch=2, strategy="lancet"),
    Layout(4, ep=2, micro_batch=2, zero=1, recompute="selective", strategy="lancet"),
    Layout(4, tp=2, ep=2, micro_batch=4, strategy="lancet"),
]


def partitioned(settings: dict[str, Any], layouts_of: Sequence[Layout]) -> tuple[Choices, list[Row]]:
    """Every router in these layouts, with one model after another, as far as a partition can be."""
    choices = replace(choices_of(RANKS), strategies={"lancet": replace(strategy("lancet"), **settings)})
    models = itertools.cycle(choices.models)
    rows = [
        Row(layout, router, config.capacity_factor, next(models), "adamw")
        for layout in layouts_of
        for router, config in choices.routers.items()
    ]
    return choices, [row for row in rows if runs(choices, row)]


def test_ranges_in_parts_equal_one_process() -> None:
    choices, rows = partitioned({"partition": "2", "join_weights": True}, PARTITIONED[3:6:2])
    half = len(choices.routers)  # each router in one of two layouts; some of them must see the whole micro-batch
    assert len(rows) == 2 * half
    assert differences(choices, rows[:half:2] + rows[half + 1 :: 2], steps=1) == []


@pytest.mark.full
@pytest.mark.parametrize(
    "model, ranges",
    [
        ("plain", "attention_heads.1..mix.1:2"),
        ("OLMoE, biases", "attention_core.1..mix.1:2"),
        ("OLMoE, biases", "score.0..attention_qkv.1:2"),
    ],
)
def test_ranges_that_begin_or_end_inside_attention_equal_one_process(model: str, ranges: str) -> None:
    """There all ranks' tokens are gathered."""
    choices = replace(choices_of(2), strategies={"lancet": replace(strategy("lancet"), partition=ranges)})
    row = Row(Layout(2, tp=2, micro_batch=8, strategy="lancet"), "topk", 0.0, model, "sgd")
    assert differences(choices, [row], steps=1) == []


@pytest.mark.full
@pytest.mark.parametrize("backward", ["whole", "mirrored"])
@pytest.mark.parametrize("parts", ["2", "4"])
@pytest.mark.parametrize(
    "more",
    [{}, {"chunks": "2"}, {"join_weights": True}, {"deferred_weights": "none", "yields": True}],
    ids=str,
)
def test_every_router_in_parts_equals_one_process(parts: str, backward: str, more: dict[str, Any]) -> None:
    choices, rows = partitioned({"partition": parts, "partition_backward": backward} | more, PARTITIONED)
    assert len(rows) >= {"2": 80, "4": 50}[parts]
    assert differences(choices, rows, steps=1) == []
