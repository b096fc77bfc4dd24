"""The star test of context parallelism: sequences cut over ranks give the numbers of one process, in float64.

`make test` has every router, model, strategy and layout once; `make test-full` all pairs of choices, and the product of layouts,
ZeRO, accumulation and routers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megalina.verify import layouts
from megalina.verify.layouts import Row, axes, config_of, pairs, product, row_of, runs
from megalina.verify.recording import SEQUENCES, Layout
from tests.verify.cases import MODELS, ROUTERS, choices_of, distinct
from tests.verify.star import RANKS, differences

GATHER, EXCHANGE = "all_gather", "all_to_all"
PARTS = 4  # of rows, which all together take minutes
CUT: list[dict[str, Any]] = [
    {"world": 2, "cp": 2, "micro_batch": 1},
    {"world": 2, "cp": 2, "cp_kind": EXCHANGE, "recompute": "selective"},
    {"world": 4, "tp": 2, "cp": 2, "zero": 1},
    {"world": 4, "ep": 2, "cp": 2, "cp_kind": EXCHANGE, "zero": 1, "piece_mb": layouts.PIECE_MB},
    {"world": 4, "cp": 4, "recompute": "full"},
    {"world": 4, "tp": 2, "cp": 2, "cp_kind": EXCHANGE, "sequence": False, "micro_batch": 4},
    {"world": 4, "cp": 2, "zero": 1, "recompute": "selective"},
    {"world": 4, "cp": 4, "cp_kind": EXCHANGE, "zero": 1},
]


def rows_of_each() -> Iterator[Row]:
    """As many rows as there are routers, in which all else takes turns; what megalina refuses is given another layout."""
    choices, models, strategies = choices_of(RANKS), itertools.cycle(MODELS), itertools.cycle(distinct())
    place = 0
    for router in ROUTERS:
        model, strategy = next(models), next(strategies)
        for turn in range(len(CUT)):
            layout = Layout(**{"tp": 1, "ep": 1, **CUT[(place + turn) % len(CUT)]}, strategy=strategy)
            if router == "global":
                layout = replace(layout, micro_batch=SEQUENCES // layout.readers)
            row = Row(layout, router, choices.routers[router].capacity_factor, model, "sgd")
            if runs(choices, row):
                yield row
                break
        place += turn + 1


def test_every_router_model_and_strategy_equals_one_process_with_its_sequences_cut() -> None:
    choices, rows = choices_of(RANKS), list(rows_of_each())
    assert {row.router for row in rows} == set(ROUTERS) and {row.model for row in rows} == set(MODELS)
    assert {row.layout.strategy for row in rows} == set(distinct())
    assert {(row.layout.cp, row.layout.cp_kind) for row in rows} == {(c, k) for c in (2, 4) for k in (GATHER, EXCHANGE)}
    assert {(row.layout.tp, row.layout.ep) for row in rows} >= {(1, 1), (2, 1), (1, 2)}
    assert differences(choices, layouts.in_order(rows), steps=1) == []


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", [GATHER, EXCHANGE])
@pytest.mark.parametrize("cp", [2, 4])
def test_every_pair_of_choices_equals_one_process(cp: int, kind: str, part: int) -> None:
    rows = rows_of_pairs(cp, kind)
    assert len(rows) >= 100
    assert differences(choices_of(RANKS), layouts.in_order(rows[part::PARTS]), steps=2) == []


@cache
def rows_of_pairs(cp: int, kind: str) -> list[Row]:
    choices = choices_of(RANKS)
    options = axes(choices, RANKS) | {"context": [(cp, kind)]}
    options["place"] = [place for place in options["place"] if place[0] % cp == 0]
    return [row_of(choices, values) for values in pairs(options, lambda values: runs(choices, row_of(choices, values)))]


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", [GATHER, EXCHANGE])
@pytest.mark.parametrize(("world", "tp", "cp"), [(2, 1, 2), (4, 1, 2), (4, 2, 2), (4, 1, 4)])
def test_the_product_of_layouts_equals_one_process(world: int, tp: int, cp: int, kind: str, part: int) -> None:
    rows = [r for r in rows_of_product() if (r.layout.world, r.layout.tp, r.layout.cp, r.layout.cp_kind) == (world, tp, cp, kind)]
    assert len(rows) >= 100
    assert differences(choices_of(RANKS), rows[part::PARTS], steps=1) == []


@cache
def rows_of_product() -> list[Row]:
    return list(product(choices_of(RANKS), RANKS, ("place", "context", "zero", "micro_batch", "router")))


@pytest.mark.full
def test_all_choices_of_the_rows_are_in_their_configurations() -> None:
    choices = choices_of(RANKS)
    for row in rows_of_each():
        parallel = config_of(choices, row).parallel
        assert (parallel.cp, parallel.cp_kind) == (row.layout.cp, row.layout.cp_kind)
