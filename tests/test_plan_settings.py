"""A plan and the settings that give it: there and back, as YAML and on a command line; what can't run is refused either way."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalina.compose import compose
from megalina.config import ModelConfig, ParallelConfig, PretrainConfig, RouterConfig, StrategyConfig, TrainConfig
from megalina.plan_settings import overrides_of, plan_of, settings_of, strategy_of
from megalina.step import candidates
from megalina.step.plan import Plan
from megalina.step.strategy import STRATEGIES
from megalina.validate import check_config
from megalina.validate_strategy import check_plan, runs

SIMPLEST = (
    *(candidates.EAGER, candidates.DDP, candidates.PRIORITY, candidates.PRIORITY_PARTITION, candidates.LINA_NOPACK),
    *(candidates.LINA, candidates.FLOW, candidates.LINA_ZERO, Plan("serial"), Plan("fixed")),
)


@pytest.mark.parametrize("plan", SIMPLEST, ids=str)
def test_candidates_have_the_numbers_of_the_yaml(plan: Plan) -> None:
    assert plan_of(compose([f"strategy={plan.strategy}"]).strategy) == plan


OTHERS = (
    replace(candidates.LINA_NOPACK, chunks=(4,)),
    replace(candidates.LINA, chunks=(1, 2), piece_bytes=4096),
    replace(candidates.FLOW, parts=4, yields=True, late_layers=4),
    replace(candidates.FLOW, parts=4, deferred_weights="all", join_weights=True),
    replace(candidates.DDP, merge_bytes=2**20),
    replace(candidates.LANCET, deferred_weights="experts", deferred_bytes=2**19),
    replace(candidates.LANCET, partition="attention.0..mix.0:2,attention.1..mix.1:4"),
    replace(candidates.LINA, packing=2, deferred_weights="all"),
)


@pytest.mark.parametrize("plan", [*candidates.OF_A_LAYOUT, *candidates.winners(zero=True), *OTHERS], ids=str)
def test_what_is_pasted_on_a_command_line_gives_the_plan(plan: Plan) -> None:
    strategy = compose([*overrides_of(plan)]).strategy
    assert plan_of(strategy) == plan and strategy.windows == "none"
    assert overrides_of(plan)[0] == f"strategy={plan.strategy}"


def test_auto_begins_with_the_simplest() -> None:
    lina = StrategyConfig(name="lina", chunks="auto", partition_bytes="auto", yields=True, packing="auto")
    assert plan_of(lina) == replace(candidates.LINA, chunks=(1,)) and plan_of(lina, packing=4).packing == 4
    assert plan_of(StrategyConfig(name="auto", packing="auto"), packing=2) == Plan("eager", packing=2)


PLANS = st.builds(
    Plan,
    strategy=st.sampled_from(list(STRATEGIES)),
    parts=st.integers(1, 3),
    chunks=st.sampled_from([(1,), (2,), (64,), (1, 2), (1, 2, 1)]),
    piece_bytes=st.sampled_from([0, 1024, 2**19]),
    merge_bytes=st.sampled_from([0, 0, 25 * 2**20]),
    yields=st.booleans(),
    late_layers=st.integers(0, 3),
    deferred_weights=st.sampled_from(["none", "experts", "all"]),
    join_weights=st.booleans(),
    partition=st.sampled_from(["none", "none", "2", "3", "9", "attention.0..mix.0:2", "counts.0..mix.1:2"]),
    partition_backward=st.sampled_from(["whole", "mirrored"]),
    packing=st.sampled_from([1, 1, 2, 3, 4]),
)
CONFIGS = st.builds(
    lambda zero, micro, limit_gb, **router: PretrainConfig(
        model=ModelConfig(num_experts=4, num_layers=2),
        router=RouterConfig(**router),
        parallel=ParallelConfig(ep=4, zero=zero),
        strategy=StrategyConfig(packing_memory_gb=limit_gb),
        train=TrainConfig(global_batch_size=4 * micro, micro_batch_size=micro, seq_len=16),
    ),
    zero=st.integers(0, 1),
    micro=st.integers(1, 4),
    limit_gb=st.sampled_from([0.0, 0.001]),
    group=st.sampled_from(["sequence", "micro_batch", "global"]),
    kind=st.sampled_from(["topk", "topk", "expert_choice"]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(config=CONFIGS, plan=PLANS)
def test_a_plan_runs_where_the_configuration_that_gives_it_is_accepted(config: PretrainConfig, plan: Plan) -> None:
    try:
        check_config(config, 4)
    except ValueError:
        return  # whatever the plan
    given = replace(config, strategy=strategy_of(plan, config.strategy))
    assert plan_of(given.strategy) == plan and settings_of(plan)["windows"] == "none"
    said = []
    for check in (lambda: check_config(given, 4), lambda: check_plan(config, plan, 4)):
        try:
            check()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    assert said[0] == said[1] and runs(config, plan, 4) == (said[0] == "")


def test_plans_of_older_runs_are_read() -> None:
    """Of a plan.json, a ledger or a checkpoint: chunks are a word there."""
    old = {"strategy": "lina", "chunks": "1,2,2", "piece_bytes": 524288, "yields": True, "packing": 2}
    plan = Plan.from_json(old)
    assert plan == Plan("lina", chunks=(1, 2, 2), piece_bytes=524288, yields=True, packing=2)
    assert plan.as_json() == old and Plan.from_json({"strategy": "eager"}) == Plan()
    windows = {"strategy": "flow", "parts": 2, "gap_bytes": [["attention", 7], ["experts", 9]], "measured_at": 5}
    assert Plan.from_json(windows).gap_bytes == (("attention", 7), ("experts", 9))


@pytest.mark.parametrize("wrong", [{"chunks": 2}, {"chunks": "two"}, {"parts": "2"}, {"yields": 1}, {"pieces": 3}])
def test_what_is_no_plan_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        Plan.from_json({"strategy": "lina", **wrong})
