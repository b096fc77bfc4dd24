"""The star test: every layout gives the numbers of one process, in float64; and the rows of which it is made.

Every activation, routing decision, loss, gradient, norm and weight of two steps (SGD in `make test`: one) to 1e-12, after AdamW
updates to 1e-10.
`make test` covers all pairs of choices, the world one of them; `make test-full` all pairs in each world, and the product of
layouts, ZeRO, accumulation and routers.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megalina.layout import rows as mesh_rows
from megalina.verify import layouts
from megalina.verify.compare import compare
from megalina.verify.layouts import Choices, Pair, Row, Values, axes, config_of, pairs, pairwise, product, row_of, runs
from megalina.verify.on_ranks import Pool
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.reference import record
from megalina.verify.shrink import shrink_router
from megalina.verify.start import random_batches
from megalina.verify.verification import verify
from tests.verify.cases import MODELS, OPTIMIZERS, ROUTERS, choices_of, config_with, strategy, with_router

RANKS = 4
SIZES: dict[str, list[Any]] = {"world": [4, 2, 1], "tp": [1, 2, 4], "ep": [1, 2, 4], "sequence": [True, False]}
# of a row: its ranks, which share two cores, and its micro-batches
COSTS = {("world", 4): 8.0, ("world", 2): 3.0, ("micro_batch", 1): 3.0, ("micro_batch", 2): 1.5}


def options_by_size() -> dict[str, Sequence[Any]]:
    """The axes of rows, but the sizes of a layout each an axis of its own: far fewer pairs than with layouts as choices."""
    options = axes(choices_of(RANKS), RANKS)
    return SIZES | {axis: options[axis] for axis in options if axis != "place"}


def with_place(values: Values) -> Values:
    return {**values, "place": tuple(values[axis] for axis in SIZES)}


@cache
def pairs_by_size() -> list[Values]:
    choices, places = choices_of(RANKS), set(layouts.places(RANKS))

    def is_a_place(values: Values) -> bool:
        return not values.keys() >= SIZES.keys() or with_place(values)["place"] in places

    def allowed(values: Values) -> bool:
        return is_a_place(values) and runs(choices, row_of(choices, with_place(values)))

    return list(pairs(options_by_size(), allowed, COSTS, is_a_place))


def differences(choices: Choices, rows: list[Row], steps: int) -> list[str]:
    """A line for every row that differs from one process or could not be run."""
    return [f"{r.row}: {r.first_difference} {r.failed}" for r in verify(choices, rows, steps=steps) if not r.equal]


# routers whose groups are micro-batches and whose tokens wait for none behind them
PASSED = {
    name: shrink_router(replace(config_with(router=name).router, capacity_factor=capacity, group="micro_batch"), 4, 4)
    for name, capacity in (("topk", 0.0), ("topk raw", 0.8), ("locmoe", 1.0), ("group limited", 1.0), ("hash", 0.8))
}
PASSED["locmoe bound"] = replace(
    PASSED["locmoe"], capacity_bound="locmoe", capacity_delta="quantile", capacity_quantile=0.9, capacity_ema=0.5
)

# the star test


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_pair_of_choices_equals_one_process(world: int) -> None:
    choices = choices_of(RANKS)
    rows = [row_of(choices, with_place(values)) for values in pairs_by_size() if values["world"] == world]
    assert 15 <= len(rows) <= 70
    for steps, names in ((2, OPTIMIZERS.keys() - {"sgd"}), (1, {"sgd"})):  # which has no state that a second step would see
        assert differences(choices, [row for row in rows if row.optimizer in names], steps=steps) == []


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_pair_of_choices_in_each_world_equals_one_process(world: int) -> None:
    choices = choices_of(world)
    rows = pairwise(choices, world, only=True)
    assert {row.layout.world for row in rows} == {world}
    assert len(rows) >= {1: 50, 2: 50, 4: 90}[world]
    assert differences(choices, rows, steps=2) == []


def test_ranks_without_a_single_token_take_part() -> None:
    """The text is one word again and again: with a hash router one expert gets every token."""
    config = with_router(config_with(router="hash"), top_k=1)
    batches = [replace(b, tokens_BS=torch.full_like(b.tokens_BS, 5)) for b in random_batches(config, 2)]
    reference = record(config, batches)
    load = reference.entry(0, "routing", "layers.0.load").value
    assert int((load[:-1] > 0).sum()) == 1
    found = {}
    with Pool() as pool:
        for world, tp, ep, sequence in layouts.places(RANKS):
            if world == RANKS and ep > 1:
                layout = Layout(world, tp, ep, sequence, zero=1)
                found[layout] = compare(reference, pool.record(config, layout, batches)).first
    assert len(found) == 4
    assert set(found.values()) == {None}


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
        walking = {name: replace(strategy(name), parts=parts, chunks="2") for name in ("flow", "lina_zero")}
        rows = [
            Row(layout, router, config.capacity_factor, model, "adamw")
            for layout, of_parts in CUT
            if (layout.world, of_parts) == (world, parts)
            for (router, config), model in zip(PASSED.items(), models)
        ]
        assert all(row.layout.micro_batches % parts for row in rows), "parts would be whole micro-batches"
        assert differences(replace(choices, strategies=walking), rows, steps=2) == []


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
    choices, rows = partitioned({"partition": "2"}, PARTITIONED[3:6:2])
    half = len(choices.routers)  # each router in one of two layouts; some of them must see the whole micro-batch
    assert len(rows) == 2 * half
    assert differences(choices, rows[:half:2] + rows[half + 1 :: 2], steps=1) == []


@pytest.mark.full
@pytest.mark.parametrize("backward", ["whole", "mirrored"])
@pytest.mark.parametrize("parts", ["2", "4"])
@pytest.mark.parametrize("more", [{}, {"chunks": "2"}, {"deferred_weights": "none", "yields": True}], ids=str)
def test_every_router_in_parts_equals_one_process(parts: str, backward: str, more: dict[str, Any]) -> None:
    choices, rows = partitioned({"partition": parts, "partition_backward": backward} | more, PARTITIONED)
    assert len(rows) >= {"2": 80, "4": 50}[parts]
    assert differences(choices, rows, steps=1) == []


@pytest.mark.full
@pytest.mark.parametrize(("world", "tp", "number"), [(1, 1, 70), (2, 1, 100), (2, 2, 100), (4, 1, 100), (4, 2, 150), (4, 4, 70)])
def test_the_product_of_layouts_and_routers_equals_one_process(world: int, tp: int, number: int) -> None:
    choices = choices_of(RANKS)
    crossed = ("place", "zero", "micro_batch", "router")
    rows = [row for row in product(choices, RANKS, crossed) if (row.layout.world, row.layout.tp) == (world, tp)]
    assert len(rows) >= number
    assert differences(choices, rows, steps=2) == []


# rows


def test_places_are_all_ways_to_cut_a_world() -> None:
    found = layouts.places(4)
    assert len(found) == len(set(found)) == 1 + 4 + 9
    assert {p for p in found if p[0] == 4} == {
        *((4, 1, ep, True) for ep in (1, 2, 4)),
        *((4, tp, ep, s) for tp, ep in ((2, 1), (2, 2), (4, 1)) for s in (True, False)),
    }
    assert len(layouts.places(7)) == len(found)  # worlds are powers of two
    assert max(p[0] for p in layouts.places(8)) == 8


@pytest.mark.full
def test_all_pairs_of_choices_that_can_run_occur() -> None:
    choices = choices_of(RANKS)
    options = axes(choices, RANKS)
    allowed = lambda values: runs(choices, row_of(choices, values))  # noqa: E731
    found = list(pairs(options, allowed))
    assert all(map(allowed, found))
    lacking = pairs_lacking(found, options)
    # statistics of all ranks can't be exact with accumulation, and need every rank's scores with capacity
    never = {(("router", name), ("capacity", True)) for name in ("global", "dense")}  # all experts get all tokens of the second
    never |= {(("place", p), ("micro_batch", m)) for p in options["place"] for m in (2, 1, 0) if m > SEQUENCES * p[1] // p[0]}
    # weights are gathered ahead under ZeRO-1 alone; parts of a micro-batch have no statistics of all ranks
    never |= {(("zero", (0, piece_mb)), ("strategy", "lina_zero")) for piece_mb in (0.0, layouts.PIECE_MB)}
    never |= {(("router", "global"), ("strategy", name)) for name in ("flow", "lina_zero")}
    refused = lacking - never
    assert all(("router", "global") in pair for pair in refused), refused
    assert len(refused) <= 2
    assert len(found) < 1.6 * len(options["place"]) * len(options["router"])


def test_all_pairs_that_can_run_occur_too_where_the_world_is_a_choice_of_its_own() -> None:
    options = options_by_size()
    found = pairs_by_size()
    places = set(layouts.places(RANKS))
    assert all(with_place(values)["place"] in places for values in found)
    # statistics of all ranks can't be exact with accumulation, and need every rank's scores with capacity
    never: set[Pair] = {(("micro_batch", 1), ("router", "global"))}
    never |= {(("router", name), ("capacity", True)) for name in ("global", "dense")}  # all experts get all tokens of the second
    never |= {(("zero", (0, piece_mb)), ("strategy", "lina_zero")) for piece_mb in (0.0, layouts.PIECE_MB)}
    never |= {(("router", "global"), ("strategy", name)) for name in ("flow", "lina_zero")}
    for size in ("tp", "ep"):
        never |= {(("world", world), (size, n)) for world in (1, 2, 4) for n in (1, 2, 4) if n > world}
    never |= {(("tp", tp), ("ep", ep)) for tp in (2, 4) for ep in (2, 4) if tp * ep > RANKS}
    never |= {(("tp", 1), ("sequence", False)), (("world", 1), ("sequence", False)), (("ep", 4), ("sequence", False))}
    assert pairs_lacking(found, options) == never
    assert len(found) < 130


def pairs_lacking(found: Iterable[Values], options: dict[str, Sequence[Any]]) -> set[Pair]:
    """Those of all pairs that no row has."""
    have = {pair for values in found for pair in itertools.combinations([(axis, values[axis]) for axis in options], 2)}
    return {
        ((a, x), (b, y)) for a, b in itertools.combinations(options, 2) for x, y in itertools.product(options[a], options[b])
    } - have


def test_pairs_of_nothing_in_the_way_are_a_covering_array() -> None:
    options = {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2], "d": [0, 1, 2]}
    found = [tuple(v[axis] for axis in options) for v in pairs(options, lambda values: True)]
    assert 9 <= len(found) <= 14
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in found} == set(itertools.product(range(3), repeat=2))


def test_a_costly_choice_is_taken_where_a_pair_needs_it_and_nowhere_else() -> None:
    options = {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2, 3, 4], "d": [0, 1, 2, 3, 4]}
    alike, costly = (list(pairs(options, lambda values: True, costs)) for costs in ({}, {("a", 0): 50.0}))
    assert 5 <= sum(v["a"] == 0 for v in costly) <= 6 < sum(v["a"] == 0 for v in alike)
    assert not pairs_lacking(costly, options)


def test_an_impossible_pair_is_left_out_and_the_others_stay() -> None:
    options = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    found = list(pairs(options, lambda v: (v["a"], v["b"]) != (1, 1)))
    assert {(v["a"], v["b"]) for v in found} == {(0, 0), (0, 1), (1, 0)}
    assert {(v["b"], v["c"]) for v in found} == set(itertools.product(range(2), repeat=2))


def test_the_product_has_every_combination_once_or_draws_what_is_not_crossed() -> None:
    choices = choices_of(2)
    choices = replace(
        choices, routers={"topk": choices.routers["topk"]}, models={"plain": choices.models["plain"]},
        optimizers={"sgd": choices.optimizers["sgd"]}, strategies=dict(list(choices.strategies.items())[:1]),
    )  # fmt: skip
    whole = list(product(choices, 2))
    # micro-batches of 2, 1 or all sequences; a capacity or none; recompute; ZeRO and pieces
    assert len(whole) == len(set(whole)) == 5 * 3 * 2 * 3 * 4
    drawn = list(product(choices, 2, ("place", "zero")))
    assert drawn == list(product(choices, 2, ("place", "zero")))
    assert {(r.layout.world, r.layout.tp, r.layout.zero, r.layout.piece_mb) for r in drawn} == {
        (r.layout.world, r.layout.tp, r.layout.zero, r.layout.piece_mb) for r in whole
    }
    assert len(drawn) == 5 * 4
    assert {r.layout.recompute for r in drawn} == {"none", "selective", "full"}


def test_auto_takes_the_product_where_it_is_small_and_pairs_else(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = choices_of(1)
    eager = {"eager": choices.strategies["eager"]}
    small = replace(
        choices, routers={"topk": choices.routers["topk"]}, models={"plain": choices.models["plain"]}, strategies=eager
    )
    whole, text = layouts.chosen_rows(small, 1, "auto")
    assert (len(whole), text) == (len(list(product(small, 1))), f"every combination: {len(whole)} rows")
    few, text = layouts.chosen_rows(small, 1, "always")
    assert len(few) < len(whole)
    assert text == f"every pair of choices occurs together: {len(few)} rows"
    monkeypatch.setattr(layouts, "MOST_ROWS", len(whole) - 1)
    assert layouts.chosen_rows(small, 1, "auto")[0] == few
    assert layouts.chosen_rows(small, 1, "never")[0] == whole


def test_a_rows_configuration_has_its_choices() -> None:
    choices = choices_of(RANKS)
    rows = [row_of(choices, with_place(values)) for values in pairs_by_size()]
    for row in rows:
        config = config_of(choices, row)
        assert config.model == choices.models[row.model]
        assert config.router == replace(choices.routers[row.router], capacity_factor=row.capacity)
        layout = row.layout
        parallel = config.parallel
        assert (parallel.tp, parallel.ep, parallel.sequence, parallel.zero) == (
            layout.tp, layout.ep, layout.sequence, layout.zero,
        )  # fmt: skip
        assert (config.train.micro_batch_size, config.train.recompute) == (layout.micro_batch, layout.recompute)
        pieces = str(int(layout.piece_mb * 2**20))
        assert (config.strategy.name, config.strategy.partition_bytes) == (layout.strategy, pieces)
    assert {row.model for row in rows} == set(MODELS)
    assert {row.router for row in rows} == set(ROUTERS)


@pytest.mark.parametrize("layout", [Layout(4, 2, 2), Layout(4, 1, 2, micro_batch=1), Layout(8, 2, 2, micro_batch=2)])
def test_a_layouts_ranks_share_the_sequences_as_the_mesh_says(layout: Layout) -> None:
    table = mesh_rows({"edp": layout.edp, "ep": layout.ep, "tp": layout.tp})
    for row in table["dp"]:
        own = [[i for part in layout.sequences(rank) for i in part] for rank in row]
        assert sum(own, []) == list(range(SEQUENCES))
    for row in table["tp"]:
        assert len({tuple(layout.sequences(rank)) for rank in row}) == 1
    assert {len(layout.sequences(rank)) for rank in range(layout.world)} == {layout.micro_batches}
    assert (len(table["copies"][0]), len(table["dp"][0])) == (layout.copies, layout.dp)
