"""A fitted network: its constants come back from steps that were walked in a known one; what it says of other lists is right."""

from dataclasses import replace
from functools import cache

import pytest

from megalina.perfmodel.sim.fitted_network import Seen, error_of, fitted, walked
from megalina.perfmodel.sim.folding import FoldedLoads
from megalina.perfmodel.sim.list_clock import ListClock
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.virtual import uses_of
from megalina.step.plan import Plan
from megalina.step.program import Program
from megalina.step.strategy import training_step
from tools.draw_strategies import Cluster, VirtualJob, ladder_job

TRUE = Network(nic_bytes_per_s=5e7, latency_s=1e-3, all_to_all_s=3e-3, hop_s=1e-4, fast_hop_s=1e-4, weight=2.0, at_once=2)
BEGIN = Network(nic_bytes_per_s=9e7, latency_s=1e-3, at_once=2)
PLANS = (Plan(), Plan("flow", parts=2), Plan("flow", parts=4, deferred_weights="all"))
OTHERS = (Plan("flow", parts=4), Plan("eager", piece_bytes=2**19), Plan("flow", parts=2, piece_bytes=2**19))


@cache
def job() -> VirtualJob:
    return ladder_job("model.num_layers=2", cluster=Cluster())


def program_of(plan: Plan) -> Program:
    return training_step(plan.strategy, job().setting.under(plan))


def clock_of(network: Network, program: Program) -> ListClock:
    step = job().priced
    loads = FoldedLoads(network, 4, step.ranks_of, uses_of(program, step.sizes), slowest=True)
    return ListClock(program, seconds=step.seconds, sizes=step.sizes, loads=loads, ranks_of=step.ranks_of)


def seen_in(network: Network, plan: Plan) -> Seen:
    program = program_of(plan)
    return Seen(program, *walked(clock_of(network, program)))


@pytest.fixture(scope="module")
def found() -> list[Network]:
    return fitted([seen_in(TRUE, plan) for plan in PLANS], [BEGIN], clock_of, walks=3 * 3 * 60)


@pytest.mark.full
def test_lists_that_were_not_seen_take_what_they_would(found: list[Network]) -> None:
    slow, late = found
    others = [seen_in(TRUE, plan) for plan in OTHERS]
    for one in others:
        assert walked(clock_of(slow, one.program))[0] == pytest.approx(one.step_s, rel=0.05)
    assert error_of(others, slow, clock_of) < error_of(others, BEGIN, clock_of) / 20
    assert 0.8 < slow.nic_bytes_per_s / TRUE.nic_bytes_per_s < 1 < 1.1 * late.nic_bytes_per_s / TRUE.nic_bytes_per_s
    assert late.nic_bytes_per_s > slow.nic_bytes_per_s and late.all_to_all_s > slow.all_to_all_s  # type: ignore[operator]


@pytest.mark.full
def test_the_better_of_two_topologies_is_taken() -> None:
    """A card for each two ranks, or one for each."""
    two = replace(BEGIN, ranks_per_node=2)
    cards = replace(two, nics_per_node=2)
    seen = [seen_in(replace(cards, nic_bytes_per_s=5e7), plan) for plan in PLANS]
    slow, late = fitted(seen, [two, cards], clock_of, walks=3 * 5 * 25)
    assert (slow.nics_per_node, late.nics_per_node) == (2, 2)


def test_few_walks_are_kept_to_and_the_same_input_gives_the_same() -> None:
    seen, walks = [seen_in(TRUE, plan) for plan in PLANS[:2]], 0

    def counted(network: Network, program: Program) -> ListClock:
        nonlocal walks
        walks += 1
        return clock_of(network, program)

    first = fitted(seen, [BEGIN], counted, walks=60)
    assert walks <= 60 and fitted(seen, [BEGIN], clock_of, walks=60) == first


@pytest.mark.parametrize(("seen", "begin"), [([], [BEGIN]), ([seen_in(TRUE, Plan())], [])])
def test_nothing_to_fit_is_refused(seen: list[Seen], begin: list[Network]) -> None:
    with pytest.raises(ValueError, match="give one at least of both"):
        fitted(seen, begin, clock_of, walks=10)
