"""The star test: every layout gives the numbers of one process, in float64; and the rows of which it is made.

Every activation, routing decision, loss, gradient, norm and weight of two steps (in `make test` one, but for sharded moments) to
1e-12, after AdamW updates to 1e-10.
`make test` covers all choices, `make test-full` all pairs of them, the world one of them, and more (test_all_layouts.py,
test_parts.py).
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megalina.layout import rows as mesh_rows
from megalina.verify import layouts
from megalina.verify.compare import compare
from megalina.verify.layouts import Pair, Row, Values, axes, config_of, pairs, product, row_of, runs
from megalina.verify.on_ranks import Pool
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.reference import record
from megalina.verify.start import random_batches
from tests.verify.cases import MODELS, ROUTERS, choices_of, config_with, with_router
from tests.verify.star import RANKS, differences, options_by_size, pairs_by_size, with_place

ONCE, PER_NODE = "once_per_rank", "once_per_node"
WITHOUT_CAPACITY = ("global", "dense", "replayed")  # the second gives all experts all tokens, the third says who gets which

# the star test


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_choice_equals_one_process(world: int) -> None:
    """Every other of the rows in which all pairs occur."""
    rows_equal_one_process(pairs_by_size()[::2], world, at_least=8)


def test_half_of_the_rows_have_every_choice() -> None:
    for axis, found in options_by_size().items():
        missing = [option for option in found if all(values[axis] != option for values in pairs_by_size()[::2])]
        assert missing == [], axis


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_pair_of_choices_equals_one_process(world: int) -> None:
    rows_equal_one_process(pairs_by_size()[1::2], world, at_least=7)  # the others: above


def rows_equal_one_process(found: Sequence[Values], world: int, at_least: int) -> None:
    choices = choices_of(RANKS)
    rows = [row_of(choices, with_place(values)) for values in found if values["world"] == world]
    assert len(rows) >= at_least
    assert differences(choices, rows, steps=steps_to_see_all) == []


def steps_to_see_all(row: Row) -> int:
    """Two where the second sees what the first has left in shards: the moments of ZeRO-1, where an optimizer has any."""
    return 2 if row.layout.zero and row.layout.world > 1 and row.optimizer != "sgd" else 1


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
    options = axes(choices, RANKS) | {"context": [(1, "all_gather")]}  # others: test_context_layouts.py
    allowed = lambda values: runs(choices, row_of(choices, values))  # noqa: E731
    found = list(pairs(options, allowed))
    assert all(map(allowed, found))
    lacking = pairs_lacking(found, options)
    # statistics of all ranks can't be exact with accumulation, and need every rank's scores with capacity
    never = {(("router", name), ("capacity", True)) for name in WITHOUT_CAPACITY}
    never |= {(("place", p), ("micro_batch", m)) for p in options["place"] for m in (2, 1, 0) if m > SEQUENCES * p[1] // p[0]}
    # weights are gathered ahead under ZeRO-1 alone; parts of a micro-batch have no statistics of all ranks
    never |= {(("zero", (0, piece_mb)), ("strategy", "lina_zero")) for piece_mb in (0.0, layouts.PIECE_MB)}
    never |= {(("router", "global"), ("strategy", name)) for name in ("flow", "pair", "lina_zero")}
    never |= {(("micro_batch", 0), ("strategy", "pair"))}  # a micro-batch alone goes with nobody
    never |= {(("place", p), ("reduce", "by_node")) for p in options["place"] if p[0] < 4}  # two nodes of two ranks
    never |= {(("place", p), ("dispatch", ONCE)) for p in options["place"] if p[2] == 1} | {
        (("dispatch", how), ("router", "dense")) for how in (ONCE, PER_NODE)
    }
    never |= {(("place", p), ("dispatch", PER_NODE)) for p in options["place"] if p[2] < 4}  # two ranks on each of two nodes
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
    never |= {(("router", name), ("capacity", True)) for name in WITHOUT_CAPACITY}
    never |= {(("zero", (0, piece_mb)), ("strategy", "lina_zero")) for piece_mb in (0.0, layouts.PIECE_MB)}
    never |= {(("router", "global"), ("strategy", name)) for name in ("flow", "pair", "lina_zero")}
    never |= {(("micro_batch", 0), ("strategy", "pair"))}  # a micro-batch alone goes with nobody
    # nobody to go to: one rank, or tensor parallelism over all of them
    never |= {((axis, n), ("dispatch", ONCE)) for axis, n in (("world", 1), ("ep", 1), ("tp", 4))}
    never |= {(("dispatch", how), ("router", "dense")) for how in (ONCE, PER_NODE)}
    never |= {((axis, n), ("dispatch", PER_NODE)) for axis, n in (("world", 1), ("world", 2), ("ep", 1), ("ep", 2))}
    never |= {((axis, n), ("dispatch", PER_NODE)) for axis, n in (("tp", 2), ("tp", 4), ("sequence", False))}
    never |= {(("world", world), ("reduce", "by_node")) for world in (1, 2)}  # two nodes of two ranks
    for size in ("tp", "ep"):
        never |= {(("world", world), (size, n)) for world in (1, 2, 4) for n in (1, 2, 4) if n > world}
    never |= {(("tp", tp), ("ep", ep)) for tp in (2, 4) for ep in (2, 4) if tp * ep > RANKS}
    never |= {(("tp", 1), ("sequence", False)), (("world", 1), ("sequence", False)), (("ep", 4), ("sequence", False))}
    assert pairs_lacking(found, options) == never
    assert len(found) < 160


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
    # places, and both ways to cut sequences over two ranks; micro-batches of 2, 1 or all sequences; a capacity or none;
    # recompute; ZeRO and pieces
    assert len(whole) == len(set(whole)) == (5 + 2 + 1) * 3 * 2 * 3 * 4
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
