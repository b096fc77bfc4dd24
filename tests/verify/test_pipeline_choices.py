"""The rows of a verification that are pipelines: every schedule with its chunks, models as deep as there are stages."""

from dataclasses import replace

import pytest

from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.verify import layouts
from megalina.verify.layouts import Choices, axes_of_pipelines, config_of, fits, pairwise_in_pipelines, uneven_stages
from tests.verify.cases import choices_of, config_with

OWN = "docs/examples/own_pipeline.py:SCHEDULE"


@pytest.fixture(scope="module")
def few() -> Choices:
    every = choices_of(2)
    return replace(
        every,
        routers={name: every.routers[name] for name in ("topk", "global")},
        strategies={name: every.strategies[name] for name in ("eager", "flow", "ddp")},
        models={"plain": every.models["plain"]},
        optimizers={"sgd": every.optimizers["sgd"]},
    )


def test_every_schedule_occurs_with_its_chunks_and_what_no_pipeline_has_does_not(few: Choices) -> None:
    options = axes_of_pipelines(few, 2)
    chunks = {name: {c for n, c in options["schedule"] if n == name} for name in SCHEDULES}
    assert chunks["1f1b"] == {1} and chunks["zbv"] == {2} and chunks["zb_h1"] == {1, 2}
    assert options["router"] == ["topk"] and "eager" in options["strategy"]
    rows = pairwise_in_pipelines(few, 2)
    assert {(row.layout.pipeline, row.layout.chunks) for row in rows} == set(options["schedule"])
    for row in rows:
        parallel, model = config_of(few, row).parallel, config_of(few, row).model
        assert (parallel.pp, parallel.pp_chunks, parallel.pp_layout) == (2, row.layout.chunks, row.layout.stages)
        assert model.num_layers == max(few.models["plain"].num_layers, 2 * row.layout.chunks)
    assert {row.layout.stages for row in rows} == {"", "E|ttL", "E|t|t|ttL"}
    assert axes_of_pipelines(few, 1)["place"] == ()


def test_layers_are_cut_unevenly_whatever_there_are() -> None:
    ahead = config_with(model="ahead").model
    assert ahead.num_layers == 1 and uneven_stages(ahead, 2) == "E|ttmmL"
    assert uneven_stages(replace(ahead, mtp_layers=0, num_layers=5), 4) == "E|t|t|tttL"


def test_sizes_that_cannot_be_are_known_at_once() -> None:
    sizes = {"place": (4, 2, 1, True), "context": (1, "all_gather"), "pp": 2, "schedule": ("interleaved", 2), "micro_batch": 2}
    assert fits(sizes) and not fits({**sizes, "pp": 4}) and not fits({**sizes, "context": (2, "all_gather")})
    assert not fits({**sizes, "schedule": ("dualpipev", 2), "micro_batch": 4}), "it takes 4 micro-batches at least"
    assert not fits({**sizes, "micro_batch": 0}), "a multiple of 2"
    assert fits({"pp": 4}) and fits({"place": (1, 1, 1, True)})


@pytest.mark.full
def test_words_choose_schedules_and_no_pipeline_is_one_of_them(few: Choices) -> None:
    own = replace(few, schedules=(*few.schedules, OWN))
    assert layouts.only(own, [f"schedule={OWN}"]).schedules == (OWN,)
    rows, how = layouts.chosen_rows(layouts.only(own, [f"schedule={OWN},zbv", "strategy=eager"]), 2, "always")
    assert {row.layout.pipeline for row in rows} == {OWN, "zbv"} and {row.layout.pp for row in rows} == {2}
    assert how == f"every pair of choices occurs together: {len(rows)} rows, {len(rows)} of them pipelines"
    rows, how = layouts.chosen_rows(layouts.only(few, ["schedule=none"]), 2, "always")
    assert {row.layout.pp for row in rows} == {1} and "pipelines" not in how
