"""The list that a search finds for a configuration: no worse than any strategy, within memory, the list that its plan gives."""

from dataclasses import replace

import pytest

from megalina.perfmodel.forecast.priced_step import Shared
from megalina.perfmodel.forecast.searched_list import Job, searched_list, starts_of
from megalina.perfmodel.sim.memory import peak_of
from megalina.step.plan import Plan
from megalina.step.strategy import STRATEGIES, training_step
from tools.draw_strategies import Cluster, ladder_job

MIB = 2**20


def job_of(*overrides: str, layers: int = 2, packing: int = 1) -> Job:
    job = ladder_job("strategy=search", f"model.num_layers={layers}", *overrides, cluster=Cluster())
    return Job(job.config, 4, job.config.data.vocab_size, job.network, job.seconds, packing)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(("parallel.zero=1", "strategy.partition_bytes=524288"), marks=pytest.mark.full),
        pytest.param(("train.micro_batch_size=1",), marks=pytest.mark.full),  # no parts of a micro-batch: of several
        pytest.param(("train.recompute=full", "router.top_k=1"), marks=pytest.mark.full),
    ],
)
def test_it_is_no_worse_than_any_strategy(overrides: tuple[str, ...]) -> None:
    found = searched_list(job_of(*overrides), evaluations=120)
    names = {plan.strategy for plan, _ in found.begun_s}
    sharded = "parallel.zero=1" in overrides
    assert names >= set(STRATEGIES) - {"search", "lina", "lina_zero", "pair"} and ("lina_zero" in names) == sharded
    assert ("pair" in names) == ("train.micro_batch_size=1" in overrides)  # else a step has one micro-batch
    assert found.step_s <= min(step_s for _, step_s in found.begun_s)
    step = job_of(*overrides).priced(replace(found.plan, order=()), Shared())
    assert training_step(found.plan.strategy, step.setting.under(found.plan)) == found.program
    assert step.walk(program=found.program).step_s == pytest.approx(found.step_s, rel=1e-9)


@pytest.mark.full
def test_memory_is_a_limit() -> None:
    job = job_of()
    eager = job.priced(Plan(), Shared())
    free, tight = (searched_list(job, evaluations=120, most_mb=most) for most in (0.0, 0.02))
    peaks = [peak_of(eager.held, found.program)[0] for found in (free, tight)]
    assert peaks[1] <= peak_of(eager.held, eager.program)[0] + 0.02 * MIB < peaks[0]
    assert tight.step_s >= free.step_s and len(tight.begun_s) < len(free.begun_s)


@pytest.mark.full
def test_packed_lists_are_those_of_strategies_that_pack_and_deferral_can_be_left_out() -> None:
    packed = starts_of(job_of(packing=2, layers=2), Shared(), deferred=False)
    assert {start.plan.packing for start in packed} == {2} and {start.plan.strategy for start in packed} == {"lina", "flow"}
    assert not any(s.phase == "W" for start in packed for s in start.program)
