"""What a pipeline can't have is one ValueError with the numbers and what to change, before any rank starts."""

from pathlib import Path
from typing import Any

import pytest

from megalina.blocks.counts import expert_bytes_on_rank
from megalina.blocks.pipelined import pipelined
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.step.candidates import EAGER
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.torch_table import to_csv
from megalina.validate import check_config
from tests.test_validate import changed

ROOT = Path(__file__).resolve().parent.parent
FOUR_LAYERS: dict[str, Any] = {
    "model__num_layers": 4, "parallel__pp": 2, "train__global_batch_size": 8, "train__micro_batch_size": 1,
}  # fmt: skip


def piped(**settings: Any) -> PretrainConfig:
    return changed(**(FOUR_LAYERS | settings))


def test_pipelines_are_accepted_with_what_acts_inside_of_a_stage() -> None:
    for name, schedule in SCHEDULES.items():
        check_config(piped(strategy__pipeline=name, parallel__pp_chunks=schedule.chunks or 2), 2)
    check_config(piped(parallel__tp=2, parallel__ep=2, parallel__zero=1, train__recompute="full"), 8)
    check_config(
        piped(strategy__name="priority", strategy__yields=True, strategy__partition_bytes="4096", strategy__chunks="2"), 4
    )
    check_config(piped(strategy__pipeline="docs/examples/own_pipeline.py:SCHEDULE"), 2)
    for name, chunks in (("1f1b", 1), ("interleaved", 2), ("dualpipev", 2), ("docs/examples/own_pipeline.py:SCHEDULE", 1)):
        check_config(piped(strategy__name="pair", strategy__pipeline=name, parallel__pp_chunks=chunks), 2)


@pytest.mark.parametrize(
    ("world", "settings", "told"),
    [
        (3, {}, r"parallel.tp \(1\) x parallel.ep \(1\) must divide the number of ranks \(3\): use a multiple"),
        (2, {"parallel__pp_chunks": 3}, r"\(4\) are fewer than parallel.pp \(2\) x parallel.pp_chunks = 6 stages"),
        (2, {"strategy__pipeline": "zbv"}, "zbv has 2 chunks on each rank, not 1"),
        (2, {"strategy__pipeline": "dualpipe"}, "there is no such schedule: choose one of gpipe, 1f1b"),
        (2, {"strategy__pipeline": "interleaved", "train__global_batch_size": 3}, "3 of them must be a multiple of 2"),
        (2, {"strategy__pipeline": "nowhere.csv"}, "strategy.pipeline=nowhere.csv can't be read"),
        (2, {"strategy__name": "search"}, "strategy=search makes a list that goes over all layers, and with parallel.pp=2"),
        (2, {"strategy__name": "pair", "strategy__pipeline": "zb_h1"}, "no pairs of a forward and a backward, as it has"),
        (2, {"strategy__name": "pair", "train__global_batch_size": 1}, "no forward goes with a backward in strategy"),
        (2, {"strategy__name": "flow", "strategy__parts": 2}, r"2 parts must divide train.micro_batch_size \(1\), as cells cut"),
        (
            4,
            {"strategy__name": "flow", "strategy__parts": 2, "train__micro_batch_size": 2, "parallel__tp": 2},
            "2 parts for each of parallel.tp=2 ranks must divide train.micro_batch_size",
        ),
        (
            2,
            {"strategy__name": "lancet", "strategy__partition": "attention.1..mix.2:2", "train__micro_batch_size": 2},
            "begins in stage 0 of the pipeline, which has layers 0 to 1, and ends in stage 1: end it with layer 1",
        ),
        (2, {"strategy__name": "lancet", "strategy__partition": "auto"}, "strategy.partition=auto and parallel.pp=2 exclude"),
        (2, {"router__group": "global", "train__micro_batch_size": 8}, "router.group=global and parallel.pp=2 exclude"),
        (2, {"parallel__pp_layout": "Ettt|t|L"}, "has 3 stages, and parallel.pp"),
        (2, {"parallel__pp_layout": "Ett|L"}, "has 2 times t"),
        (2, {"parallel__pp_layout": "Etttm|tL", "model__mtp_layers": 1}, "one E comes first, then t, then m"),
        (2, {"parallel__pp_layout": "Ettttm|L", "model__mtp_layers": 1}, "put all m into the last stage"),
        (2, {"optim__name": "muon_clip", "parallel__pp_layout": "E|ttttL"}, "rank 0 has no layer: give each rank one"),
        (1, {"parallel__pp": 1, "parallel__pp_chunks": 2}, "parallel.pp_chunks=2 does nothing with parallel.pp=1"),
        (1, {"parallel__pp": 1, "strategy__pipeline": "zbv"}, "strategy.pipeline=zbv does nothing with parallel.pp=1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(world: int, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_config(piped(**settings), world)


def test_what_is_measured_or_packed_is_accepted_too() -> None:
    check_config(piped(strategy__name="auto", strategy__packing="auto", parallel__ep=2), 4)
    check_config(piped(strategy__name="lina", strategy__packing="2", parallel__ep=2, strategy__yields=True), 4)
    check_config(piped(strategy__name="lina_zero", strategy__parts=2, parallel__zero=1, train__micro_batch_size=2), 4)
    check_config(piped(strategy__name="priority", strategy__windows="auto", strategy__chunks="auto"), 2)
    check_config(piped(profile__record=True), 2)


def test_the_memory_of_packed_experts_is_the_fullest_stages() -> None:
    limit = {"strategy__name": "lina", "strategy__packing": "2", "parallel__ep": 2, "model__dense_layers_first": 1}
    two_layers = expert_bytes_on_rank(
        changed(**FOUR_LAYERS | {"parallel__pp": 1, "model__num_layers": 2, "parallel__ep": 2}), 2, 2
    )
    check_config(piped(**limit, strategy__packing_memory_gb=two_layers / 1e9), 4)
    with pytest.raises(ValueError, match="needs at least"):
        check_config(piped(**limit, strategy__packing_memory_gb=0.99 * two_layers / 1e9), 4)


def test_the_documentation_shows_the_file_of_ones_own_schedule() -> None:
    assert (ROOT / "conf/pipeline/paired_1f1b.yaml").read_text() in (ROOT / "docs/pipelines.md").read_text()


def test_a_table_must_be_of_the_ranks_stages_and_micro_batches(tmp_path: Path) -> None:
    def table(ranks: int, chunks: int, micro_batches: int) -> str:
        path = tmp_path / f"{ranks}{chunks}{micro_batches}.csv"
        path.write_text(to_csv(SCHEDULES["zb_h1"].pipeline(Size(ranks, chunks, micro_batches))))
        return str(path)

    check_config(piped(strategy__pipeline=table(2, 1, 8)), 2)
    for numbers, told in {
        (4, 1, 8): "has lists of 4 ranks, and parallel.pp is 2: set parallel.pp=4",
        (2, 2, 8): r"has 4 stages, and parallel.pp \(2\) x parallel.pp_chunks \(1\) is 2",
        (2, 1, 4): "it is of 4 micro-batches, and a step has 8",
    }.items():
        with pytest.raises(ValueError, match=told):
            check_config(piped(strategy__pipeline=table(*numbers)), 2)
    path = tmp_path / "wrong.csv"
    path.write_text("0F0,0B0\n1B0,1F0\n")
    with pytest.raises(ValueError, match="1B0: it takes what 1F0 gives"):
        check_config(piped(strategy__pipeline=str(path), train__global_batch_size=1), 2)


def test_layers_are_cut_by_what_they_cost_with_embedding_and_head() -> None:
    config = piped(model__num_layers=8, model__vocab_size=50_000, model__d_model=64)
    small = piped(model__num_layers=8, model__vocab_size=100, model__d_model=64)
    heavy, light = (pipelined(of, 2).stages for of in (config, small))
    assert len(light[0].layers) == 4 and len(heavy[0].layers) > 4  # the head is as dear as some layers
    dense = piped(model__num_layers=8, model__dense_layers_first=4, model__dense_d_ff=8, model__vocab_size=100)
    assert len(pipelined(dense, 2).stages[0].layers) > 4  # dense layers that cost less than those with experts


def test_what_is_of_one_list_refuses_pipelines() -> None:
    with pytest.raises(ValueError, match="parallel.pp=2: this is of ranks that all hold the same list"):
        PricedStep(piped(), 2, EAGER, vocab_size=100)
