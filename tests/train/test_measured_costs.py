"""Measured costs: from events of virtual steps back to what made them, also for lists that were not walked."""

import pytest

from megalina.perfmodel.sim.network import one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate_alike
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.step.strategy import Setting, training_step
from megalina.train.measured_costs import MeasuredCosts, Sample, sample_of
from tests.perfmodel.sim.schedules import SHAPES, buckets_of

SHAPE = SHAPES["experts in every layer"]
SETTING = Setting(SHAPE, buckets_of(SHAPE, piece=40), micro_batches=2)
RANKS, LATENCY_S, BYTES_PER_S = 4, 1e-3, 1e6
FLOOR_S = 2e-4  # of a kernel, whatever its share
FULL_S = {"attention": 0.01, "experts": 0.014}


def took(s: Instruction) -> float:
    """Backward takes twice as long as forward, a half of it for the weights."""
    if s.kind is not Kind.COMPUTE or s.name not in FULL_S or s.phase == "U":
        return 0.0
    one = FLOOR_S + FULL_S[s.name] * s.share / s.chunk[1]
    return one * {"F": 1, "W": 1, "B": 1 if s.late else 2}[s.phase]


def sent(s: Instruction) -> float:
    if s.op is Op.GRADS:
        return 4.0 * (s.piece[1] - s.piece[0])
    return {Op.TOKENS: 6e4 * s.share / s.chunk[1], Op.COUNTS: 64.0}.get(s.op, 16.0)  # type: ignore[arg-type]


def groups(axis: str, rank: int) -> tuple[int, ...]:
    return tuple(range(RANKS))


def list_of(plan: Plan) -> Program:
    return training_step(plan.strategy, SETTING.under(plan))


def sample(plan: Plan) -> Sample:
    program = list_of(plan)
    timeline = simulate_alike(
        program,
        ranks=RANKS,
        ranks_of=groups,
        seconds=took,
        network=one_level(BYTES_PER_S, LATENCY_S),
        sizes=Sizes(sent),
    )
    return sample_of([timeline.events(0)] * 2, program, lambda axis: RANKS)


@pytest.fixture(scope="module")
def costs() -> MeasuredCosts:
    costs = MeasuredCosts(gradient_bytes=4, weight_bytes=4)
    costs.add([sample(Plan()), sample(Plan())], list_of(Plan()))
    other = Plan("flow", parts=4, deferred_weights="all")
    costs.add([sample(other)], list_of(other))
    return costs


@pytest.mark.parametrize(
    "plan", [Plan(), Plan("flow", parts=4), Plan("flow", parts=4, chunks=(2,)), Plan("lancet", deferred_weights="all")], ids=str
)
def test_lists_that_were_not_walked_cost_what_they_would(costs: MeasuredCosts, plan: Plan) -> None:
    for s in list_of(plan):
        wanted = took(s)
        if s.phase in "BW" and wanted:  # deferred backward was seen in one size alone, so its floor is not told from the rest
            assert costs.seconds(s) == pytest.approx(wanted, rel=0.1, abs=2 * FLOOR_S), s.tag
        else:
            assert costs.seconds(s) == pytest.approx(wanted, rel=1e-6, abs=1e-9), s.tag
        if s.kind is Kind.START:
            assert costs.sizes(s) == pytest.approx(sent(s), abs=1.0), s.tag


def test_the_wire_is_found(costs: MeasuredCosts) -> None:
    assert costs.latency_s == pytest.approx(LATENCY_S, rel=0.03)  # and the smallest send
    assert 1 / costs.s_per_byte == pytest.approx(BYTES_PER_S, rel=0.02)


def test_the_slowest_rank_counts_and_what_was_never_seen_costs_nothing() -> None:
    costs = MeasuredCosts(4, 2)
    fast = Sample({(("F:attention", False), 1.0): 1.0}, {}, 1e-3, 1e-6, 1.0)
    slow = Sample({(("F:attention", False), 1.0): 3.0}, {}, 2e-3, 5e-7, 1.0)
    costs.add([fast, slow], list_of(Plan()))
    attention = next(s for s in list_of(Plan()) if s.name == "attention")
    assert costs.seconds(attention) == 3.0 and (costs.latency_s, costs.s_per_byte) == (2e-3, 1e-6)
    others = [s for s in list_of(Plan("lancet", deferred_weights="all")) if s.name != "attention"]
    assert {costs.seconds(s) for s in others} == {0.0}
    pieces = [s for s in others if s.op is Op.GRADS and s.kind is Kind.START]
    assert [costs.sizes(s) for s in pieces] == [4.0 * (s.piece[1] - s.piece[0]) for s in pieces]
