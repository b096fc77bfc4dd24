"""Figures from seconds: of a machine that is made up, what it was made of is found again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.measure.figures import curve, figures_of, hops_and_bytes, line
from megalina.measure.report import warnings
from megalina.measure.shapes import CPU
from megalina.perfmodel.sim.collectives import Collective
from tests.measure import made


def test_what_the_machine_was_made_of_is_found_again() -> None:
    found = figures_of(made.machine())
    assert found.flops_per_s == pytest.approx(made.FLOPS_PER_S)
    assert found.half_size == pytest.approx(made.HALF_SIZE)
    assert found.half_size_error < 0.05 and found.curve_error < 1e-9
    largest = made.share(max(CPU.sides))
    for side, share in found.curves["bfloat16"]:
        assert share == pytest.approx(made.share(side) / largest)
    assert found.copy_bytes_per_s == pytest.approx(made.COPY_BYTES_PER_S)
    assert found.pass_bytes_per_s == pytest.approx(made.PASS_BYTES_PER_S)
    assert found.memory_bytes_per_s == found.copy_bytes_per_s
    assert found.attention_share == pytest.approx(made.ATTENTION_SHARE)
    assert (found.kernel_s, found.host_instruction_s) == (pytest.approx(made.KERNEL_S), pytest.approx(made.HOST_INSTRUCTION_S))


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (1, 2), (1, 8), (4, 1), (2, 4), (3, 2)])
def test_links_inside_nodes_and_over_them_are_told_apart(nodes: int, ranks_per_node: int) -> None:
    found = figures_of(made.machine(nodes, ranks_per_node)).wires
    assert set(found) == {where for where, ranks in (("inside", ranks_per_node), ("over", nodes)) if ranks > 1}
    for where, wire in found.items():
        assert wire.hop_s == pytest.approx(made.HOP_S[where])
        assert wire.bytes_per_s == pytest.approx(made.WIRE_BYTES_PER_S[where])
        assert max(wire.errors.values()) < 1e-9
        assert max(own.error for own in wire.own.values()) < 1e-9


def test_of_two_passes_the_faster_one_counts_and_the_slower_one_says_how_far_they_differ() -> None:
    disturbed = made.machine(disturbed=1.4)
    assert figures_of(disturbed) == figures_of(made.machine())
    assert list(disturbed.spread.values()) == pytest.approx([0.4] * len(disturbed.spread))
    assert warnings(made.machine(), num_cores=4) == []
    assert ["differ by 40%" in text for text in warnings(disturbed, num_cores=4)] == [True]


def test_collectives_that_have_lines_of_their_own_are_off_the_one_line_and_it_says_so() -> None:
    machine = made.machine()
    for of in machine.passes:
        for key in of:
            if " all-reduce " in key:
                of[key] *= 2  # type: ignore[index]
    wire = figures_of(machine).wires["inside"]
    assert max(own.error for own in wire.own.values()) < 1e-9
    assert wire.errors["all-reduce"] > 0.1


def test_hops_and_bytes_are_those_of_virtual_time() -> None:
    assert hops_and_bytes(Collective.ALL_TO_ALL, 4) == (1, 0.75)
    assert hops_and_bytes(Collective.ALL_REDUCE, 4) == (6, 1.5)
    assert hops_and_bytes(Collective.REDUCE_SCATTER, 4) == hops_and_bytes(Collective.ALL_GATHER, 4) == (3, 0.75)


@given(st.floats(0, 1e-2), st.floats(1e-12, 1e-6), st.lists(st.floats(1, 1e8), min_size=2, max_size=6, unique=True))
def test_a_line_is_found_again(latency_s: float, s_per_byte: float, sizes: list[float]) -> None:
    points = [(n, latency_s + s_per_byte * n) for n in sizes]
    found = line(points)
    assert found.latency_s >= 0 and found.s_per_byte >= 0 and found.error < 1e-3


@given(st.lists(st.floats(1e-4, 1e-1), min_size=2, max_size=5))
def test_whatever_the_times_are_no_line_falls_or_begins_below_zero(times_s: list[float]) -> None:
    found = line([(4.0**i, s) for i, s in enumerate(times_s)])
    assert found.latency_s >= 0 and found.s_per_byte >= 0 and math.isfinite(found.error)


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=11))
def test_a_curve_lets_no_smaller_product_take_longer(shares: list[float]) -> None:
    found = curve([(2.0**i, share) for i, share in enumerate(shares)])
    assert [size for size, _ in found] == [2.0**i for i in range(len(shares))]
    assert all(share >= given for (_, share), given in zip(found, shares, strict=True))
    times_s = [size / share for size, share in found]
    assert all(a <= b * (1 + 1e-12) for a, b in zip(times_s, times_s[1:], strict=False))
    assert max(share for _, share in found) <= 1
