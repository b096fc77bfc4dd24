"""Plans: what a configuration begins with, what a search may try, and that all of it can run."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.config import ModelConfig, ParallelConfig, PretrainConfig, RouterConfig, StrategyConfig, TrainConfig
from megalina.parallel.plan_file import questions
from megalina.plan_settings import plan_of
from megalina.step.candidates import CHUNKS, PIECES_BYTES
from megalina.step.plan import Plan, chunks_text
from megalina.validate import check_config

WORLD = 4


def config_of(strategy: dict[str, Any], *, zero: int = 0, micro_batch_size: int = 4, **router: Any) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(num_experts=4, num_layers=6),
        router=RouterConfig(**router),
        parallel=ParallelConfig(ep=WORLD, zero=zero),
        strategy=StrategyConfig(**strategy),
        train=TrainConfig(global_batch_size=4 * micro_batch_size, micro_batch_size=micro_batch_size, seq_len=32),
    )


def tried(config: PretrainConfig, packings: tuple[int, ...] = (1,), best: str = "") -> list[Plan]:
    """All plans of a search in which the strategy `best` is always the fastest."""
    seen = [plan_of(config.strategy)]
    for question in questions(config, WORLD, packings=packings):
        favourite = next((plan for plan in seen if plan.strategy == best), seen[0])
        seen += [plan for plan in question(favourite) if plan not in seen]
    return seen


def test_numbers_as_given_leave_nothing_to_try() -> None:
    config = config_of({"name": "lina_nopack", "yields": True, "chunks": "2", "partition_bytes": "1000"})
    assert questions(config, WORLD, packings=(1,)) == []
    assert plan_of(config.strategy) == Plan("lina_nopack", yields=True, chunks=(2,), piece_bytes=1000)


def test_numbers_that_say_auto_are_tried_one_after_another() -> None:
    config = config_of({"name": "lina_nopack", "yields": True, "chunks": "auto", "partition_bytes": "auto"})
    plans = tried(config)
    assert {p.chunks for p in plans} == set(CHUNKS) and {p.piece_bytes for p in plans} == {2**19, *PIECES_BYTES}
    assert len(plans) == 1 + 2 + 2 and {p.strategy for p in plans} == {"lina_nopack"} and all(p.yields for p in plans)


def test_packings_are_tried_for_lina_and_flow() -> None:
    config = config_of({"name": "lina", "yields": True, "packing": "auto"})
    assert [p.packing for p in tried(config, (1, 2, 4))] == [1, 2, 4]


@pytest.mark.parametrize(("zero", "best"), [(0, "flow"), (0, "lina"), (0, ""), (1, "lina_zero"), (1, "flow")])
def test_auto_tries_what_has_won_somewhere_and_all_of_it_can_run(zero: int, best: str) -> None:
    config = config_of({"name": "auto", "packing": "auto"}, zero=zero)
    plans = tried(config, (1, 2, 4), best)
    assert {"eager", "flow", "lina"} <= {p.strategy for p in plans}
    assert ("lina_zero" in {p.strategy for p in plans}) == bool(zero)
    assert {1, 2, 4} == {p.packing for p in plans if p.strategy == (best or "lina")}
    assert len(plans) == len(set(plans)) <= 17
    for plan in plans:
        strategy = StrategyConfig(
            name=plan.strategy, partition_bytes=str(plan.piece_bytes), parts=plan.parts, chunks=chunks_text(plan.chunks),
            yields=plan.yields, late_layers=plan.late_layers, deferred_weights=plan.deferred_weights, packing=str(plan.packing),
            join_weights=plan.join_weights,
            partition=plan.partition, partition_backward=plan.partition_backward,
        )  # fmt: skip
        check_config(replace(config, strategy=strategy), WORLD)


def test_auto_does_not_try_what_can_not_run() -> None:
    one_sequence = config_of({"name": "auto"}, micro_batch_size=1)
    assert not {p.parts for p in tried(one_sequence)} - {1}
    chooses_in_groups = config_of({"name": "auto"}, kind="expert_choice", group="micro_batch")
    assert "flow" not in {p.strategy for p in tried(chooses_in_groups)}


@given(
    plan=st.builds(
        Plan,
        strategy=st.sampled_from(["eager", "flow"]),
        parts=st.integers(1, 8),
        chunks=st.sampled_from([(1,), (2,), (1, 2)]),
        piece_bytes=st.integers(0, 2**20),
        yields=st.booleans(),
        gap_bytes=st.lists(st.tuples(st.sampled_from(["experts", "attention"]), st.integers(0, 2**30)), max_size=2).map(tuple),
        packing=st.integers(1, 8),
        deferred_weights=st.sampled_from(["none", "experts", "all"]),
        join_weights=st.booleans(),
        partition=st.sampled_from(["none", "2", "attention.0..mix.2:2,attention.3..mix.5:4"]),
        times_us=st.lists(st.tuples(st.sampled_from(["W:experts", "B:combine>"]), st.floats(0, 1e9)), max_size=2).map(tuple),
    )
)
def test_a_plan_survives_its_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    assert str(plan).startswith(plan.strategy) and "\n" not in str(plan)


def test_numbers_that_would_do_nothing_are_refused() -> None:
    for strategy, says in (
        (
            {"name": "eager", "parts": 2},
            "strategy.parts=2 does nothing with strategy=eager, only with flow or pair or lina_zero or lancet",
        ),
        ({"name": "eager", "yields": True}, "strategy.yields=True does nothing with strategy=eager"),
        ({"name": "flow", "bucket_mb": 25.0}, "strategy.bucket_mb=25.0 does nothing with strategy=flow, only with ddp"),
        ({"name": "auto", "chunks": "2"}, "strategy=auto finds strategy.chunks itself: leave it at 1"),
        ({"name": "auto", "partition_bytes": "4096"}, "strategy=auto finds strategy.partition_bytes itself: leave it at 0"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            check_config(config_of(strategy), WORLD)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="partition_bytes=auto and parallel.zero=1 exclude each other"):
        check_config(config_of({"name": "priority_partition", "partition_bytes": "auto"}, zero=1), WORLD)
