"""The network shares its links fairly, wastes nothing, and takes as long as closed forms and a plain simulator say."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import prod
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.perfmodel.sim.collectives import Collective
from megalina.perfmodel.sim.network import Load, Loads, Network, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.traffic import Moving, Traffic, fair_rates
from megalina.perfmodel.sim.virtual import simulate
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.step.strategy import training_step
from tests.perfmodel.sim import fluid
from tests.perfmodel.sim.schedules import LAYOUTS, NAMED, SHAPES, delays, random_network, ranks_of, setting_of, start, wait
from tests.perfmodel.sim.watched_links import fair_and_thrifty, together
from tests.profiles import examples

SIZES = Sizes(lambda s: 4.0 * max(10, s.piece[1] - s.piece[0]))


def ends_s(network: Network, *starts: Instruction, ranks: int = 8) -> dict[str, float]:
    """When each has arrived, on all ranks, with nothing else to do."""
    program = (*starts, *(wait(s.name, s.op, s.axis) for s in starts))
    timeline = simulate(
        [program] * ranks,
        ranks_of=lambda axis, rank: tuple(range(ranks)),
        seconds=lambda rank, instruction: 0.0,
        network=network,
        sizes=NAMED,
    )
    return {e.name.split()[0]: e.end_s for e in timeline.events(0) if e.kind == "send"}


# closed forms: 4 nodes of 2 ranks, cards of 100 bytes a second


def test_an_all_to_all_alone_takes_as_long_as_the_fullest_links() -> None:
    cards = Network(nic_bytes_per_s=100, ranks_per_node=2)
    assert ends_s(cards, start("a 800")) == pytest.approx({"a": 12.0})  # 2 ranks x 6 others x 100 bytes leave a node
    own = Network(nic_bytes_per_s=100, ranks_per_node=2, nics_per_node=2)
    assert ends_s(own, start("a 800")) == pytest.approx({"a": 6.0})
    ports = Network(nic_bytes_per_s=100, ranks_per_node=2, nics_per_node=2, fast_bytes_per_s=50, nic_behind_port=True)
    assert ends_s(ports, start("a 800")) == pytest.approx({"a": 14.0})
    beside = Network(nic_bytes_per_s=100, ranks_per_node=2, fast_bytes_per_s=5)
    assert ends_s(beside, start("a 800")) == pytest.approx({"a": 20.0})  # a port has one flow of 100


def test_the_core_is_the_limit_where_it_has_too_many_nodes() -> None:
    """Of the 12 flows that leave a node 8 leave its group of two, which has 200 / 4 bytes a second."""
    core = Network(nic_bytes_per_s=100, ranks_per_node=2, nodes_per_group=2, oversubscription=4)
    assert ends_s(core, start("a 800")) == pytest.approx({"a": 2 * 8 * 100 / 50})
    assert ends_s(Network(nic_bytes_per_s=100, ranks_per_node=2, nodes_per_group=2), start("a 800")) == pytest.approx({"a": 12.0})


def test_an_all_reduce_alone_takes_as_long_as_its_algorithm_says() -> None:
    def alone_s(**more: object) -> float:
        return ends_s(Network(nic_bytes_per_s=100, ranks_per_node=2, **more), start("g 800", Op.GRADS))["g"]

    assert alone_s() == pytest.approx(2 * 7 / 8 * 800 / 100)
    assert alone_s(hop_s=0.5, fast_hop_s=0.25, latency_s=3) == pytest.approx(14 + 2 * (4 * 0.5 + 3 * 0.25) + 3)
    assert alone_s(nics_per_node=2, rings=2) == pytest.approx(7.0)
    assert alone_s(algorithm="tree") == pytest.approx(12.0)  # the busiest of both trees' nodes sends to three others, 400 each
    assert alone_s(algorithm="hierarchical") == pytest.approx(2 * 3 / 4 * 800 / 100)  # both ranks send on the one card
    assert alone_s(algorithm="hierarchical", fast_bytes_per_s=40) == pytest.approx(12 + 2 * 400 / 40)
    assert alone_s(algorithm="direct") == pytest.approx(2 * 12 * 100 / 100)


def test_many_token_flows_lose_little_to_one_ring_unless_collectives_share() -> None:
    """Twelve flows leave a node against one; as collectives they would be one against one."""
    both = start("a 800"), start("g 800", Op.GRADS, "dp")
    by_flow = ends_s(Network(nic_bytes_per_s=100, ranks_per_node=2), *both)
    assert by_flow == pytest.approx({"a": 13.0, "g": 26.0})  # 100 bytes a flow at 100 / 13, then 1300 of 1400 are left
    by_collective = ends_s(Network(nic_bytes_per_s=100, ranks_per_node=2, share="collective"), *both)
    assert by_collective == pytest.approx({"a": 24.0, "g": 26.0})


def test_a_class_that_comes_first_starves_the_others() -> None:
    both = start("g 800", Op.GRADS, "dp"), start("a 800")
    for share in ("flow", "collective"):
        network = Network(nic_bytes_per_s=100, ranks_per_node=2, share=share, first=((Op.TOKENS,),))
        assert ends_s(network, *both) == pytest.approx({"a": 12.0, "g": 26.0})


def test_two_equal_flows_share_and_what_has_no_limit_takes_no_time() -> None:
    network = Network(nic_bytes_per_s=100, latency_s=1)
    assert ends_s(network, start("a 200"), start("b 200", axis="dp"), ranks=2) == {"a": 3.0, "b": 3.0}
    assert ends_s(Network(nic_bytes_per_s=100, ranks_per_node=8, latency_s=1), start("a 200")) == {"a": 1.0}


def test_uneven_routing_takes_as_long_as_the_rank_that_gets_most() -> None:
    matrix = np.array([[9.0, 100.0, 0.0], [0.0, 9.0, 0.0], [0.0, 300.0, 9.0]])
    core = Network(nic_bytes_per_s=100, nodes_per_group=1, oversubscription=2)
    for network, want_s in ((Network(nic_bytes_per_s=100), 4.0), (one_level(100, 0), 4.0), (core, 8.0)):
        timeline = simulate(
            [(start("a 0"), wait("a 0"))] * 3,
            ranks_of=lambda axis, rank: (0, 1, 2),
            seconds=lambda rank, instruction: 0.0,
            network=network,
            sizes=Sizes(NAMED.bytes_of, matrix_of=lambda instruction, ranks: matrix),
        )
        assert timeline.step_s == pytest.approx(want_s)


def test_what_goes_to_two_groups_shares_the_way_up_and_what_comes_from_two_the_way_down() -> None:
    network = Network(nic_bytes_per_s=100, nodes_per_group=1, oversubscription=2)
    loads = Loads(network, 3)
    for matrix, link in (
        (np.array([[0.0, 1, 1], [0, 0, 0], [0, 0, 0]]), 12),
        (np.array([[0.0, 0, 0], [1, 0, 0], [1, 0, 0]]), 15),
    ):
        (load,) = loads.of("ep", Collective.ALL_TO_ALL, (0, 1, 2), matrix)
        assert load.bytes_on(18)[link] == 2  # after 6 ports and 6 cards: up from 0, 1, 2, down to 0, 1, 2
        assert load.bytes_on(18)[12:].sum() == 4


# properties


def random_links(random: np.random.Generator) -> tuple[np.ndarray, Load]:
    links, bundles = random.integers(1, 6), random.integers(1, 9)
    on_BL = random.random((bundles, links)) < 0.4
    on_BL[np.arange(bundles), random.integers(0, links, bundles)] = True
    bundle_I, link_I = np.nonzero(on_BL)
    weight_I = random.choice([1.0, 1.0, 2.0, 0.3], len(bundle_I))
    return random.choice([1.0, 10.0, 37.0], links), Load(random.random(bundles) + 0.1, bundle_I, link_I, weight_I, 0.0)


@given(seed=st.integers(0, 2**32))
def test_no_link_is_overfull_and_none_could_be_faster_at_the_cost_of_a_faster_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity_L, load = random_links(random)
    for urgency_B in (np.zeros(len(load.amount_B), int), random.integers(0, 3, len(load.amount_B))):
        rate_B = fair_rates(capacity_L, load.bundle_I, load.link_I, load.weight_I, urgency_B)
        fair_and_thrifty(capacity_L, load, rate_B, urgency_B)
        first_B = urgency_B == urgency_B.min()
        on_I = first_B[load.bundle_I]
        number_B = np.cumsum(first_B) - 1
        alone_B = fair_rates(
            capacity_L, number_B[load.bundle_I[on_I]], load.link_I[on_I], load.weight_I[on_I], np.zeros(first_B.sum(), int)
        )
        assert rate_B[first_B] == pytest.approx(alone_B)  # the most urgent don't notice the others


@given(seed=st.integers(0, 2**32))
def test_all_bytes_arrive_and_links_are_fair_at_all_times(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity_L, _ = random_links(random)
    loads = []
    while len(loads) < 5:
        _, load = random_links(random)
        if load.link_I.max() < len(capacity_L):
            loads.append(load)
    traffic, now_s, next_s = Traffic(capacity_L), 0.0, np.inf
    came_s = sorted(random.choice([0.0, 0.1, 0.7], 5).tolist())
    sent: dict[Moving, np.ndarray] = {}
    while loads or traffic.moving:
        after_s = min(came_s[0] if loads else np.inf, next_s)
        for m in traffic.moving:
            sent[m] = sent.get(m, 0.0) + m.rate_B * (after_s - now_s)
        now_s = after_s
        for m in traffic.ended(now_s):
            assert sent[m] == pytest.approx(m.whole_B)
        while loads and came_s[0] <= now_s:
            came_s.pop(0)
            traffic.add(loads.pop(), 3.0, int(random.integers(0, 2)), now_s)
        next_s = traffic.settle(now_s)
        if traffic.moving:
            fair_and_thrifty(capacity_L, *together(traffic.moving))
    assert len(sent) == 5


def takes_as_long_as_said(seed: int) -> None:
    """A list of computations, collectives and waits in a random order, on a random network; some all-to-alls are uneven."""
    random = Random(seed)
    ranks = random.choice([2, 3, 4, 6])
    halves = {r: tuple(o for o in range(ranks) if o % 2 == r % 2) for r in range(ranks)} if ranks in (4, 6) else None
    instructions: list[Instruction] = []
    open_: list[Instruction] = []
    axes = ["ep", "dp", "half"] if halves else ["ep", "dp"]
    for i in range(random.randint(2, 7)):
        op = random.choice([Op.TOKENS, Op.SUM, Op.GATHER, Op.GRADS])
        open_.append(start(f"x{i} {random.choice([30, 60, 120])}", op, random.choice(axes)))
        instructions += [Instruction("F", Kind.COMPUTE, f"c{i}"), open_[-1]]
        if random.random() < 0.5:
            done = open_.pop(random.randrange(len(open_)))
            instructions.append(wait(done.name, done.op, done.axis))
    program: Program = (*instructions, *(wait(s.name, s.op, s.axis) for s in open_), Instruction("F", Kind.COMPUTE, "end"))
    durations: Mapping = {
        (r, s): Fraction(random.choice([0, 1, 2, 7]), 4) for r in range(ranks) for s in program if s.kind is Kind.COMPUTE
    }
    groups = {tuple(range(ranks)), *(halves or {}).values()}
    uneven = {
        (s, group): np.array([[random.choice([0.0, 15.0, 40.0]) for _ in group] for _ in group])
        for s in program
        if s.kind is Kind.START and random.random() < 0.5
        for group in groups
    }
    network = replace(random_network(random, groups), at_once=0)  # the plain one knows nothing of it
    what = {
        "ranks_of": lambda axis, r: halves[r] if axis == "half" else tuple(range(ranks)),
        "network": network,
        "sizes": Sizes(NAMED.bytes_of, matrix_of=lambda instruction, group: uneven.get((instruction, group))),
    }
    want_s = fluid.step_s(program, ranks, seconds=durations, **what)
    found = simulate([program] * ranks, seconds=lambda r, s: float(durations.get((r, s), 0)), **what)
    assert found.step_s == pytest.approx(float(want_s), rel=1e-9)


@given(seed=st.integers(0, 2**32))
def test_small_lists_take_as_long_as_a_plain_simulator_says(seed: int) -> None:
    takes_as_long_as_said(seed)


@pytest.mark.full
@examples(15)
@given(seed=st.integers(0, 2**32))
def test_thousands_of_small_lists_take_as_long_as_a_plain_simulator_says(seed: int) -> None:
    takes_as_long_as_said(seed)


def no_slower(seed: int, share: str, faster: str, *, alike: bool) -> None:
    """Eager on a random layout, with ranks that are alike or not, where `faster` links get faster.

    It is no theorem.  What comes earlier may meet other things on the wire: where ranks are unlike, steps were seen that got
    longer by 5e-6.  And where some links alone get faster, a collective that they held back takes more of the links that it
    shares with others: with faster cards an all-reduce slowed the tokens beside it in their node, and the step by 3e-5.  Where
    ranks are alike and all links get faster, no such step was seen."""
    random = Random(seed)
    shape = SHAPES[random.choice(list(SHAPES))]
    program, drawn_s = training_step("eager", setting_of("eager", shape, random)), delays(random)
    layout = random.choice([place for place in LAYOUTS if (place[2] > 1) == shape.tp and place != (2, 2, 2)])
    rate, per_node, ratio = 10 ** random.uniform(3, 7), random.choice([1, 2]), random.choice([1, 4])
    times_s = []
    for factor in (1.0, random.uniform(1, 1.1), random.uniform(1.1, 3), 30.0):
        network = Network(
            nic_bytes_per_s=rate * (factor if faster != "ports" else 1),
            fast_bytes_per_s=ratio * rate * (factor if faster != "cards" else 1),
            ranks_per_node=per_node,
            share=share,
            hop_s=1e-5,
        )
        what = {"ranks_of": ranks_of(layout), "network": network, "sizes": SIZES}
        seconds = (lambda rank, s: drawn_s(0, s)) if alike else drawn_s
        times_s.append(simulate([program] * prod(layout), seconds=seconds, **what).step_s)
    for slower_s, faster_s in pairwise(times_s):
        assert faster_s <= slower_s * (1 + (1e-9 if alike and faster == "all" else 1e-2))


faster = {
    "seed": st.integers(0, 2**32),
    "share": st.sampled_from(["flow", "collective"]),
    "faster": st.sampled_from(["all", "cards", "ports"]),
    "alike": st.booleans(),
}


@pytest.mark.full
@given(**faster)
def test_eager_is_no_slower_on_a_faster_network(seed: int, share: str, faster: str, alike: bool) -> None:
    no_slower(seed, share, faster, alike=alike)


@pytest.mark.full
@examples(2.5)
@given(**faster)
def test_eager_is_no_slower_in_hundreds_of_cases(seed: int, share: str, faster: str, alike: bool) -> None:
    no_slower(seed, share, faster, alike=alike)


def test_flows_of_one_way_and_size_are_one_bundle() -> None:
    (load,) = Loads(Network(nic_bytes_per_s=1, ranks_per_node=8), 64).of("ep", Collective.ALL_TO_ALL, tuple(range(64)))
    assert len(load.amount_B) == 8 * 7  # one of 64 flows for each pair of nodes
    assert load.bytes_on(2 * 64 + 16)[128:] == pytest.approx([8 * 56 / 64] * 16)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"nic_bytes_per_s": 0}, "nic_bytes_per_s is 0: give bytes a second above 0"),
        ({"fast_bytes_per_s": float("nan")}, "fast_bytes_per_s is nan"),
        ({"hop_s": -1}, "hop_s is -1: give seconds, 0 or more"),
        ({"nics_per_node": 3}, r"nics_per_node \(3\) must be 1 to ranks_per_node \(2\)"),
        ({"rings": 0}, r"rings \(0\) must be 1 to ranks_per_node \(2\)"),
        ({"oversubscription": 0.5}, "oversubscription 0.5: give 0 or more nodes, and 1 or more"),
        ({"algorithm": "star"}, "algorithm is 'star': choose one of direct, ring, tree, hierarchical"),
        ({"all_to_all": "ring"}, "all_to_all is 'ring': choose one of direct, hierarchical"),
        ({"share": "none"}, "share is 'none': choose one of flow, collective"),
    ],
)
def test_what_can_not_be_is_refused(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(**{"nic_bytes_per_s": 1, "ranks_per_node": 2, **bad})
