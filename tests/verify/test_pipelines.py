"""The star test for pipelines: every schedule gives the numbers of one process, in float64, in layouts of every kind.

`make test` has every schedule, model, router, strategy and layout once; `make test-full` all pairs of choices, and the product of
schedules, layouts, ZeRO, accumulation and cuts.  Ranks are threads here (tests/parallel/thread_ranks.py);
test_pipelines_on_ranks.py, test_plants.py and tests/train/test_pipeline_run.py have real ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.placement.expert_order import ExpertOrders, write_orders
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.torch_table import to_csv
from megalina.verify.compare import compare
from megalina.verify.layouts import product
from megalina.verify.recording import Layout
from megalina.verify.reference import record
from megalina.verify.start import random_batches
from tests.verify.pipeline_rows import (
    MOST_RANKS,
    RANKS,
    choices,
    config_of,
    difference,
    differences,
    every_choice,
    every_pair,
    inside_of_cells,
    options,
    recorded,
)

PARTS = 4  # of rows, which all together take minutes
CROSSED = ("pp", "schedule", "cut", "place", "zero", "micro_batch")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_choice_equals_one_process() -> None:
    rows, of = every_choice(RANKS), options(RANKS)
    assert {(row.layout.pipeline, row.layout.chunks) for row in rows} == set(of["schedule"])
    assert {row.layout.pp for row in rows} == {2, 4} and {bool(row.layout.stages) for row in rows} == {True, False}
    assert {row.model for row in rows} == set(of["model"]) and {row.router for row in rows} == set(of["router"])
    assert {row.layout.strategy for row in rows} == set(of["strategy"])
    assert {row.layout.dispatch for row in rows} == set(of["dispatch"])
    assert differences(rows, steps=1) == []


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("1f1b", 1), *(pytest.param(name, 2, marks=pytest.mark.full) for name in ("interleaved", "dualpipev"))],
)
def test_pairs_give_the_numbers_of_one_process(schedule: str, chunks: int) -> None:
    layout = Layout(2, pp=2, micro_batch=1, chunks=chunks, pipeline=schedule, strategy="pair")
    assert difference(config_of(layout, model="dense first, shared experts", num_layers=2 * chunks + 1), layout) == ""


ROWS: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(4, tp=2, pp=2, micro_batch=1, zero=1, pipeline="zb_h1"), {"num_layers": 3, "optimizer": "muon"}),
    (Layout(4, ep=2, pp=2, micro_batch=1, recompute="full"), {"num_layers": 3, "router": "expert choice"}),
    (Layout(4, pp=2, micro_batch=1, chunks=2, pipeline="zbv", zero=1), {"num_layers": 4, "model": "ahead"}),
    (Layout(4, pp=4, stages="E|tt|tt|L", strategy="ddp"), {"num_layers": 4, "model": "GPT-2", "optimizer": "sgd"}),
    (Layout(2, pp=2, stages="Ettt|tmmL"), {"num_layers": 4, "model": "ahead", "router": "sigmoid"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "settings"), [pytest.param(*row, id=str(i), marks=[pytest.mark.full] * (i < 4)) for i, row in enumerate(ROWS)]
)
def test_stages_that_differ_and_ranks_beside_them(layout: Layout, settings: dict[str, Any]) -> None:
    assert difference(config_of(layout, **settings), layout) == ""


CELLS: list[tuple[Layout, dict[str, Any]]] = [  # in parts, and with weights' gradients that come later
    (
        Layout(2, pp=2, micro_batch=2, chunks=2, pipeline="zbv", strategy="flow", zero=1),
        {"num_layers": 4, "model": "dense first, shared experts", "router": "locmoe"},
    ),
    (
        Layout(2, pp=2, micro_batch=2, strategy="lancet"),
        {"num_layers": 3, "numbers": {"partition": "2", "join_weights": True}, "router": "expert choice"},
    ),
    (Layout(4, pp=2, ep=2, micro_batch=2, strategy="flow"), {"num_layers": 2, "numbers": {"late_layers": 1}}),
    (Layout(4, pp=2, zero=1, micro_batch=2, strategy="lina_zero", pipeline="zb_h1"), {"num_layers": 2}),
    (Layout(4, pp=2, ep=2, micro_batch=2, strategy="lina"), {"num_layers": 2, "numbers": {"packing": "2"}, "router": "sigmoid"}),
    (
        Layout(2, pp=2, micro_batch=4, strategy="flow"),
        {"num_layers": 2, "model": "ahead", "numbers": {"deferred_weights": "all"}},
    ),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("layout", "settings"), [pytest.param(*row, id=str(i)) for i, row in enumerate(CELLS)])
def test_cells_in_parts_and_with_later_weights(layout: Layout, settings: dict[str, Any]) -> None:
    assert difference(config_of(layout, **settings), layout, steps=2) == ""


@pytest.mark.full
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_strategies_inside_of_cells(schedule: str, part: int) -> None:
    rows = inside_of_cells(schedule, 8, seed=part)
    found = [f"{what}: {first}" for config, layout, what in rows if (first := difference(config, layout, steps=2))]
    assert found == []


@pytest.mark.full
def test_a_table_of_torch_is_a_schedule(tmp_path: Path) -> None:
    for with_sends in (False, True):
        pipeline = SCHEDULES["dualpipev"].pipeline(Size(2, 2, 8, paired=True))
        table = tmp_path / f"{with_sends}.csv"
        table.write_text(to_csv(with_messages(pipeline) if with_sends else pipeline))
        layout = Layout(2, pp=2, chunks=2, micro_batch=1, pipeline=str(table))
        assert difference(config_of(layout, num_layers=4), layout) == ""


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_choices_equals_one_process(part: int) -> None:
    rows = every_pair()
    assert len(rows) >= 100 and max(row.layout.world for row in rows) == MOST_RANKS
    assert differences(rows[part::PARTS], steps=2) == []


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_product_of_a_schedule_and_layouts_equals_one_process(schedule: str) -> None:
    of = options(RANKS)
    of["schedule"] = [(name, chunks) for name, chunks in of["schedule"] if name == schedule]
    rows = list(product(choices(), RANKS, CROSSED, of))
    assert len(rows) >= 40 and {row.layout.pp for row in rows} == {2, 4}
    assert differences(rows, steps=1) == []


def test_experts_may_lie_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalina.parallel.trainable.all_gather_object", lambda mesh, value: [value])
    write_orders(tmp_path / "orders.json", ExpertOrders(4, 1, {0: (2, 0, 3, 1), 1: (3, 2, 1, 0)}))
    layout = Layout(4, ep=2, pp=2, micro_batch=1, zero=1)
    config = config_of(layout, num_layers=2)
    reference = record(config, random_batches(config, 1))
    config = replace(config, parallel=replace(config.parallel, placement=str(tmp_path / "orders.json")))
    assert compare(reference, recorded(config, layout, 1)).first is None
