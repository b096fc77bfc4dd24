"""A collective alone, and two at once, take as long as the textbook says; every number is drawn.

n ranks; alpha seconds a hop between nodes, beta inside (Thakur, Rabenseifner and Gropp, 2005, sections 2 and 4).
"""

from math import inf, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.virtual import simulate
from megalina.step.program import Instruction, Op
from tests.perfmodel.sim.schedules import NAMED, start, wait

bandwidths = st.floats(1e3, 1e9)
hops = st.one_of(st.just(0.0), st.floats(1e-7, 1e-2))
sizes = st.integers(1, 10**9)
algorithms = st.sampled_from(["ring", "direct", "tree"])
few = st.integers(2, 4)
SUMS = (Op.SUM, Op.GRADS)


def alone_s(network: Network, size: int, op: Op, ranks: int) -> float:
    return ends_s(network, [(start(f"a {size}", op), 0.0)], ranks)["a"]


def ends_s(network: Network, starts: list[tuple[Instruction, float]], ranks: int) -> dict[str, float]:
    """When each has arrived, of things that leave after so many seconds, each on an axis of its own."""
    program = (*(s for s, _ in starts), *(wait(s.name, s.op, s.axis) for s, _ in starts))
    lag = {s.name: lag_s for s, lag_s in starts}
    timeline = simulate(
        [program] * ranks,
        ranks_of=lambda axis, rank: tuple(range(ranks)),
        seconds=lambda rank, instruction: lag.get(instruction.name, 0.0) if instruction.kind.name == "START" else 0.0,
        network=network,
        sizes=NAMED,
    )
    return {e.name.split()[0]: e.end_s for e in timeline.events(0) if e.kind == "send"}


@given(n=st.integers(2, 9), size=sizes, rate=bandwidths, alpha=hops, own=hops, algorithm=algorithms)
def test_one_rank_a_node(n: int, size: int, rate: float, alpha: float, own: float, algorithm: str) -> None:
    network = Network(nic_bytes_per_s=rate, hop_s=alpha, latency_s=own, algorithm=algorithm)
    wire_s = (n - 1) / n * size / rate
    assert alone_s(network, size, Op.TOKENS, n) == pytest.approx(wire_s + alpha + own)
    steps = 1 if algorithm == "direct" else n - 1
    for op in (Op.SCATTER, Op.GATHER):
        assert alone_s(network, size, op, n) == pytest.approx(wire_s + steps * alpha + own)
    for op in SUMS:
        if algorithm == "tree":
            depth = int(log2(n))
            assert alone_s(network, size, op, n) == pytest.approx(size / rate * fullest(n) + 2 * depth * alpha + own)
        else:
            assert alone_s(network, size, op, n) == pytest.approx(2 * wire_s + 2 * steps * alpha + own)


def fullest(n: int) -> float:
    """The share of the bytes on the busiest card: half of them in each of two binary trees of n nodes, the second one with the
    nodes turned round; a node sends up once, and down to each child."""

    def edges(i: int) -> int:
        return (i > 0) + sum(2 * i + k < n for k in (1, 2))

    return max(edges(i) + edges(n - 1 - i) for i in range(n)) / 2


@given(nodes=few, inside=few, size=sizes, rate=bandwidths, fast=bandwidths, alpha=hops, beta=hops, own=hops)
def test_nodes_of_several_ranks(
    nodes: int, inside: int, size: int, rate: float, fast: float, alpha: float, beta: float, own: float
) -> None:
    n = nodes * inside
    network = {"nic_bytes_per_s": rate, "ranks_per_node": inside, "fast_bytes_per_s": fast, "latency_s": own}
    network |= {"hop_s": alpha, "fast_hop_s": beta}
    # direct: a card has what D ranks send to the n - D outside; a port what a rank sends to its D - 1 neighbours
    to_all_s = max(inside * (n - inside) / n * size / rate, (inside - 1) / n * size / fast)
    assert alone_s(Network(**network), size, Op.TOKENS, n) == pytest.approx(to_all_s + alpha + own)
    # ring: one flow leaves a node, one rank's port has all but one of its neighbours' flows
    ring_s = (n - 1) / n * size * max(1 / rate, 1 / fast)
    assert alone_s(Network(**network), size, Op.GATHER, n) == pytest.approx(ring_s + nodes * alpha + (n - 1 - nodes) * beta + own)
    own_ring = Network(**network, algorithm="ring", rings=inside, nics_per_node=inside)
    most_s = (n - 1) / n * size * max(1 / inside / rate, (inside - 1) / inside / fast)
    wanted_s = 2 * (most_s + nodes * alpha + (n - 1 - nodes) * beta) + own
    assert alone_s(own_ring, size, Op.GRADS, n) == pytest.approx(wanted_s)
    # hierarchical: direct scatter inside, a ring for each D-th between nodes, all on one card, direct gather inside
    both = Network(**network, algorithm="hierarchical", all_to_all="hierarchical")
    in_s, out_s = (inside - 1) / inside * size / fast, inside * (nodes - 1) / nodes * size / inside / rate
    inner, outer = in_s + beta, out_s + (nodes - 1) * alpha
    assert alone_s(both, size, Op.GRADS, n) == pytest.approx(2 * inner + 2 * outer + own)
    assert alone_s(both, size, Op.SCATTER, n) == pytest.approx(inner + outer + own)
    assert alone_s(both, size, Op.GATHER, n) == pytest.approx(inner + outer + own)


@given(
    first=sizes,
    second=sizes,
    rate=bandwidths,
    after=st.floats(0, 2),
    own=hops,
    share=st.sampled_from(["flow", "collective"]),
)
def test_two_at_once_have_half_of_the_link_each(
    first: int, second: int, rate: float, after: float, own: float, share: str
) -> None:
    """The second one comes when `after` of the time is over that the first one takes alone; all-to-alls of two ranks."""
    a_s, b_s = first / 2 / rate, second / 2 / rate
    came_s = after * a_s
    network = Network(nic_bytes_per_s=rate, latency_s=own, share=share)
    found = ends_s(network, [(start(f"a {first}"), 0.0), (start(f"b {second}", axis="dp"), came_s)], 2)
    left_s = max(a_s - came_s, 0.0)  # of the first one, alone, when the second one comes
    if came_s >= a_s:
        want = {"a": a_s, "b": came_s + b_s}
    elif left_s <= b_s:
        want = {"a": came_s + 2 * left_s, "b": came_s + left_s + b_s}
    else:
        want = {"a": a_s + b_s, "b": came_s + 2 * b_s}
    assert {name: end_s - own for name, end_s in found.items()} == pytest.approx(want, abs=1e-9 * (a_s + b_s + own))


@given(size=sizes, n=st.integers(2, 5), k=st.integers(1, 6), rate=bandwidths)
def test_equal_ones_end_together_after_as_long_as_one_of_all_their_bytes(size: int, n: int, k: int, rate: float) -> None:
    network = Network(nic_bytes_per_s=rate)
    starts = [(start(f"x{i} {size}", axis=f"axis{i}"), 0.0) for i in range(k)]
    found = ends_s(network, starts, n)
    assert list(found.values()) == pytest.approx([k * alone_s(network, size, Op.TOKENS, n)] * k)


def test_what_has_no_limit_takes_its_latency_alone() -> None:
    network = Network(nic_bytes_per_s=inf, hop_s=0.5, latency_s=0.25)
    assert alone_s(network, 800, Op.GRADS, 4) == 2 * 3 * 0.5 + 0.25
    assert alone_s(network, 800, Op.TOKENS, 4) == 0.5 + 0.25
