"""Forecasts of small clusters: what sums, what must not exceed what, and how figures follow those of the cluster's file."""

from dataclasses import replace
from typing import Any

import pytest

from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import RESERVED_BYTES, Forecast, forecast, memory_limit_bytes
from megalina.perfmodel.forecast.search import Candidate, accepted, candidate, ordered, search
from megalina.plan_settings import strategy_of
from megalina.step.candidates import EAGER, OF_A_LAYOUT
from megalina.step.plan import Plan

WORLD, VOCAB = 8, 4096
FLOW = Plan("flow", parts=2)
SMALL = (
    *("model=bench", "cluster=h100_400g", "cluster.nodes=1", "parallel.ep=4", "train.global_batch_size=32", "train.seq_len=512"),
    *("train.micro_batch_size=2", "train.dtype=bfloat16"),
)


def config_of(*overrides: str) -> PretrainConfig:
    return compose([*SMALL, *overrides])


def forecast_of(config: PretrainConfig, plan: Plan = EAGER) -> Forecast:
    planned = replace(config, strategy=strategy_of(plan, config.strategy))
    return forecast(planned, WORLD, vocab_size=VOCAB, plan=plan)


def with_hardware(config: PretrainConfig, **values: Any) -> PretrainConfig:
    return replace(config, cluster=replace(config.cluster, hardware=replace(config.cluster.hardware, **values)))


def test_a_step_is_what_is_computed_and_what_is_waited_for() -> None:
    found = forecast_of(config_of())
    assert found.step_s == pytest.approx(found.walked.compute_s + sum(found.exposed_s.values()), rel=1e-6)
    assert found.tokens == 32 * 512 and found.tokens_per_s == pytest.approx(found.tokens / found.step_s)
    assert 0 < found.mfu < 0.5
    assert found.memory.peak == sum(found.memory.rows().values())


def test_parts_hide_what_eager_waits_for() -> None:
    slow = replace(config_of(), cluster=replace(config_of().cluster, ranks_per_node=1, nodes=WORLD, link_gbit=100.0))
    slow = with_hardware(slow, domain_ranks=1, nics_per_node=1)
    eager, flow = forecast_of(slow), forecast_of(slow, FLOW)
    assert flow.exposed_s["a2a"] < 0.9 * eager.exposed_s["a2a"]


@pytest.mark.parametrize("plan", [EAGER, FLOW], ids=str)
def test_nothing_gets_slower_on_better_hardware(plan: Plan) -> None:
    config = config_of()
    base = forecast_of(config, plan).step_s
    hardware = config.cluster.hardware
    for name in ("bfloat16_tflops", "memory_gbyte_s", "domain_gbyte_s"):
        assert forecast_of(with_hardware(config, **{name: 2 * getattr(hardware, name)}), plan).step_s <= base * (1 + 1e-9), name


def test_an_uneven_load_costs_time_and_memory() -> None:
    config = config_of()
    even, skewed = (forecast(config, WORLD, vocab_size=VOCAB, load=load) for load in (1.0, 3.0))
    assert skewed.step_s > even.step_s and skewed.memory.peak > even.memory.peak


def test_zero_saves_memory_and_more_so_on_more_ranks() -> None:
    whole, sharded = (forecast_of(config_of(f"parallel.zero={zero}")).memory.state["moments"] for zero in (0, 1))
    assert sharded < 0.6 * whole


@pytest.mark.full
def test_a_search_gives_what_the_trainer_accepts_the_fastest_first() -> None:
    words = (
        "train.global_batch_size=64",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.num_kv_heads=2",
        "model.num_experts=2",
    )
    found = search(config_of(*words), WORLD, vocab_size=VOCAB)
    assert len(found) > 20 and all(accepted(c.config, WORLD) for c in found)
    times = [c.found.step_s for c in found if c.found]
    assert times == sorted(times)
    assert {c.plan.strategy for c in found} > {"eager", "flow", "lina"}
    best = found[0]
    again = config_of(*words, *best.overrides())
    assert again.strategy == best.config.strategy and again.parallel == best.config.parallel and again.train == best.config.train


def test_what_does_not_fit_comes_last_and_is_not_walked() -> None:
    config = with_hardware(config_of(), memory_gib=RESERVED_BYTES / 2**30 + 0.05)
    found = candidate(config, EAGER, WORLD, vocab_size=VOCAB)
    assert not found.fits and found.memory_bytes > memory_limit_bytes(config.cluster)
    fits = candidate(config_of(), EAGER, WORLD, vocab_size=VOCAB)
    assert ordered([found, fits]) == [fits, found]


def test_plans_are_taken_up_again_as_they_are() -> None:
    config = config_of("parallel.zero=1")
    for plan in OF_A_LAYOUT[::3]:
        planned = replace(config, strategy=strategy_of(plan, config.strategy))
        again = compose([*SMALL, "parallel.zero=1", *Candidate(planned, plan, 0, None).overrides()])
        assert again.strategy == planned.strategy, plan


def test_no_layout_at_all_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"train.global_batch_size \(3\)"):
        search(config_of("train.global_batch_size=3", "model.num_layers=1"), WORLD, vocab_size=VOCAB)  # one layer: no stages
