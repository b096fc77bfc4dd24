"""Planners: every expert sits somewhere, on few enough slots, and loads are as even as the rules of each planner allow."""

import builtins
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.placement.placement import EMPTY, Placement
from megalina.placement.planners.first_fit import FirstFit
from megalina.placement.planners.greedy import greedy
from megalina.placement.planners.hierarchical import by_node, hierarchical
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.predictor import Floats
from placement_lab.optimum import optimum, smallest_largest_load

Planner = Callable[[Floats, int, int], Placement]
PLANNERS: dict[str, Planner] = {
    "identity": identity,
    "greedy": greedy,
    "greedy, no exchange": partial(greedy, max_exchanges=0),
    "one node": lambda share_E, devices, slots: hierarchical(share_E, devices, slots, devices_per_node=devices),
    "a device a node": by_node(1),
    "first fit": FirstFit(),
    "nearest": FirstFit("nearest", capacity=1.2, renormalise=False),
    "ceil": FirstFit("ceil", capacity=0.5, most_per_device=1),
    "two full devices in one": FirstFit(capacity=2.0),
}


@st.composite
def shares(draw: st.DrawFn) -> tuple[Floats, int, int]:
    """(share_E, num_devices, slots_per_device) with room; often ties, zeros, one expert with everything, no spare slot."""
    num_experts, num_devices = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    least = -(-num_experts // num_devices)
    share = st.one_of(st.sampled_from([0.0, 0.25, 1.0, 40.0]), st.floats(0.0, 1.0))
    share_E = np.array(draw(st.lists(share, min_size=num_experts, max_size=num_experts)))
    return share_E * draw(st.sampled_from([1.0, 1e-300, 4e306, 0.01])), num_devices, least + draw(st.integers(0, 3))


def skewed(num_experts: int, number: int, alpha: float = 0.5) -> Floats:
    return np.random.default_rng((num_experts, number)).dirichlet(np.full(num_experts, alpha))


def even_load(share_E: Floats, placement: Placement) -> Floats:
    """Load of each device, 1 being a fair share, where each replica has an equal part."""
    load_N = np.zeros(placement.num_devices)
    for share, devices in zip(share_E / share_E.sum(), placement.copies(), strict=True):
        load_N[list(devices)] += share / len(devices)
    return load_N * placement.num_devices


def check_slots(placement: Placement, num_experts: int, num_devices: int, slots_per_device: int) -> None:
    assert (placement.num_devices, placement.slots_per_device) == (num_devices, slots_per_device)
    assert placement.num_experts == num_experts and all(placement.copies())
    for device in placement.slots:
        experts = [e for e in device if e != EMPTY]
        assert len(set(experts)) == len(experts)


# all planners


@pytest.mark.parametrize("name", PLANNERS)
@given(case=shares())
def test_every_expert_sits_somewhere_and_nowhere_twice(name: str, case: tuple[Floats, int, int]) -> None:
    share_E, num_devices, slots_per_device = case
    before_E = share_E.copy()
    placement = PLANNERS[name](*case)
    check_slots(placement, len(share_E), num_devices, slots_per_device)
    assert placement == PLANNERS[name](*case) and (share_E == before_E).all()
    assert all(type(e) is int for device in placement.slots for e in device)


@pytest.mark.parametrize("name", [name for name in PLANNERS if name != "nearest"])  # which does not scale
def test_only_ratios_of_shares_matter_and_nothing_known_is_uniform(name: str) -> None:
    share_E = skewed(12, 0) / skewed(12, 0).max()
    assert PLANNERS[name](share_E, 4, 4) == PLANNERS[name](2.0**1023 * share_E, 4, 4)  # whose sum is infinite
    assert PLANNERS[name](np.zeros(12), 4, 4) == PLANNERS[name](np.ones(12), 4, 4)


@pytest.mark.parametrize("name", ["greedy", "one node", "a device a node", "first fit"])
@pytest.mark.parametrize("number", range(5))
def test_the_numbers_of_experts_do_not_matter(name: str, number: int) -> None:
    share_E = skewed(12, number)
    order_E = np.random.default_rng(number).permutation(12)
    load_N, permuted_N = (even_load(s, PLANNERS[name](s, 4, 4)) for s in (share_E, share_E[order_E]))
    assert np.sort(load_N) == pytest.approx(np.sort(permuted_N))
    mirrored_N = even_load(share_E[::-1], PLANNERS[name](share_E[::-1], 4, 4))
    assert np.sort(load_N) == pytest.approx(np.sort(mirrored_N))


@pytest.mark.parametrize("planner", [*PLANNERS.values(), optimum])
def test_what_cannot_be_planned_is_said(planner: Planner) -> None:
    with pytest.raises(ValueError, match="9 experts need as many slots.*raise slots_per_device to 3"):
        planner(np.ones(9), 4, 2)
    with pytest.raises(ValueError, match="expert 1 is expected to get a share of -0.5"):
        planner(np.array([1.0, -0.5]), 2, 2)
    with pytest.raises(ValueError, match="expert 0 is expected to get a share of nan"):
        planner(np.array([float("nan"), 1.0]), 2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        planner(np.ones((2, 2)), 2, 2)


# identity


def test_identity_is_the_layout_of_training() -> None:
    assert identity(skewed(4, 0), 2, 2).slots == ((0, 1), (2, 3))
    assert identity(skewed(4, 0), 2, 3).slots == ((0, 1, EMPTY), (2, 3, EMPTY))
    assert identity(np.zeros(5), 3, 2).slots == ((0, 1), (2, 3), (4, EMPTY))


# first fit


def test_first_fit_gives_whole_devices_first_and_packs_the_rest_in_falling_order() -> None:
    share_E = np.array([0.1, 0.55, 0.15, 0.2])  # of 4 devices: 0.4, 2.2, 0.6, 0.8
    assert FirstFit()(share_E, 4, 2).slots == ((1, EMPTY), (1, EMPTY), (3, 1), (2, 0))
    # what is rounded up or down has no remainder
    assert FirstFit("nearest")(share_E, 4, 2).slots == ((1, EMPTY), (1, EMPTY), (3, EMPTY), (2, 0))
    assert FirstFit("ceil")(share_E, 4, 2).slots == ((1, 0), (1, EMPTY), (1, EMPTY), (3, 2))


def test_first_fit_rounds_as_it_is_told() -> None:
    share_E = np.array([1.4, 1.6, 0.5, 0.5]) / 4
    copies = {rounding: FirstFit(rounding)(share_E, 4, 3).copies() for rounding in ("floor", "nearest", "ceil")}
    assert [len(c) for c in copies["floor"]] == [2, 2, 1, 1]
    assert [len(c) for c in copies["nearest"]] == [1, 2, 1, 1]
    assert [len(c) for c in copies["ceil"]] == [2, 2, 1, 1]
    assert copies["ceil"][0] == (2, 3) and copies["ceil"][1] == (0, 1)  # whole devices for both
    assert copies["floor"][0][0] == 1 and copies["floor"][1][0] == 0  # a whole device and a part for both
    assert FirstFit("ceil")(np.array([0.5, 0.5]), 4, 1).copies() == ((0, 1), (2, 3))  # 2.0 stays 2


def test_first_fit_spreads_experts_that_nobody_expects_over_free_devices() -> None:
    share_E = np.array([0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
    assert FirstFit(renormalise=False)(share_E / 2, 4, 4).slots[2:] == ((2, 4, EMPTY, EMPTY), (3, 5, EMPTY, EMPTY))
    full = FirstFit()(share_E, 4, 4).copies()
    assert [len(devices) for devices in full] == [2, 2, 1, 1, 1, 1] and len(set(full[2:])) == 4


def test_first_fit_scales_shares_or_does_not() -> None:
    share_E = np.array([0.25, 0.125, 0.125])  # half of the rows are not foreseen
    assert FirstFit()(share_E, 4, 2).copies()[0] == (0, 1)
    assert FirstFit(renormalise=False)(share_E, 4, 2).copies() == ((0,), (1,), (1,))
    assert FirstFit(renormalise=False)(8 * share_E, 4, 2) == FirstFit()(share_E, 4, 2)


def test_first_fit_keeps_to_the_capacity_and_to_the_number_of_experts_while_there_is_room() -> None:
    share_E = np.full(8, 1 / 8)  # of 4 devices: 0.5 each
    assert FirstFit()(share_E, 4, 8).slots[0][:3] == (0, 1, EMPTY)
    assert FirstFit(capacity=2.0)(share_E, 4, 8).slots[0][:5] == (0, 1, 2, 3, EMPTY)
    assert FirstFit(capacity=2.0, most_per_device=3)(share_E, 4, 8).slots[0][:4] == (0, 1, 2, EMPTY)
    counts = [sum(e != EMPTY for e in d) for d in FirstFit(most_per_device=1)(share_E, 4, 8).slots]
    assert counts == [2, 2, 2, 2]  # more than one, since each expert must sit somewhere


@given(case=shares(), most=st.integers(1, 4))
def test_first_fit_passes_the_number_of_experts_only_in_need(case: tuple[Floats, int, int], most: int) -> None:
    share_E, num_devices, slots_per_device = case
    placement = FirstFit(most_per_device=most)(share_E, num_devices, slots_per_device)
    counts = [sum(e != EMPTY for e in device) for device in placement.slots]
    if max(counts) > most:
        assert min(counts) >= min(most, slots_per_device)  # all have as many as they should


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rounding": "up"}, "floor, nearest or ceil"), ({"capacity": 0.0}, "above 0"), ({"most_per_device": 0}, "at least 1")],
)
def test_first_fit_refuses_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FirstFit(**fields)


# greedy


@given(case=shares())
def test_greedy_uses_all_slots_and_is_never_worse_than_without_exchanges(case: tuple[Floats, int, int]) -> None:
    share_E, num_devices, slots_per_device = case
    share_E = share_E / share_E.max() if share_E.any() else np.ones(len(share_E))
    placement, plain = greedy(*case), greedy(*case, max_exchanges=0)
    for p in (placement, plain):
        assert sum(map(len, p.copies())) == min(num_devices * slots_per_device, num_devices * len(share_E))
    assert even_load(share_E, placement).max() <= even_load(share_E, plain).max() + 1e-9
    # what has most rows a replica has a further replica first
    part_E = [share / len(devices) for share, devices in zip(share_E / share_E.sum(), placement.copies(), strict=True)]
    before_E = [p * n / (n - 1) for p, n in zip(part_E, map(len, placement.copies()), strict=True) if n > 1]
    single_E = [p for p, n in zip(part_E, map(len, placement.copies()), strict=True) if n < num_devices]
    assert not before_E or not single_E or min(before_E) >= max(single_E) - 1e-9


def every_placement(num_experts: int, num_devices: int, slots_per_device: int) -> Iterator[Placement]:
    """All placements with full slots, but for the order of devices and slots."""
    per_device = list(combinations(range(num_experts), min(slots_per_device, num_experts)))
    for chosen in combinations_with_replacement(per_device, num_devices):
        if len({e for device in chosen for e in device}) == num_experts:
            yield Placement(num_experts, tuple((*d, *[EMPTY] * (slots_per_device - len(d))) for d in chosen))


@pytest.mark.parametrize(
    ("num_experts", "num_devices", "slots_per_device"), [(4, 2, 2), (4, 2, 3), (5, 3, 2), (6, 2, 3), (4, 3, 2)]
)
def test_greedy_is_near_the_best_of_all_placements(num_experts: int, num_devices: int, slots_per_device: int) -> None:
    gaps = []
    for number in range(10):
        share_E = skewed(num_experts, number)
        placements = list(every_placement(num_experts, num_devices, slots_per_device))
        best = min(even_load(share_E, p).max() for p in placements)
        found = even_load(share_E, greedy(share_E, num_devices, slots_per_device)).max()
        assert found >= best - 1e-9
        gaps.append(found / best - 1)
    assert np.median(gaps) < 0.03 and max(gaps) < 0.35, gaps


def test_greedy_places_64_experts_evenly() -> None:
    worst = []
    for number in range(20):
        share_E = skewed(64, number)
        worst.append(even_load(share_E, greedy(share_E, 8, 10)).max())
    assert np.median(worst) < 1.002 and max(worst) < 1.01, worst
    plain = [even_load(skewed(64, n), greedy(skewed(64, n), 8, 10, max_exchanges=0)).max() for n in range(20)]
    assert np.median(worst) < 1 + 0.5 * (np.median(plain) - 1)  # exchanges pay


# hierarchical


@given(case=shares(), devices_per_node=st.integers(1, 3))
def test_hierarchical_keeps_replicas_of_an_expert_on_one_node(case: tuple[Floats, int, int], devices_per_node: int) -> None:
    share_E, num_nodes, slots_per_device = case
    num_devices = num_nodes * devices_per_node
    placement = hierarchical(share_E, num_devices, slots_per_device, devices_per_node=devices_per_node)
    check_slots(placement, len(share_E), num_devices, slots_per_device)
    share_E = share_E / share_E.max() if share_E.any() else np.ones(len(share_E))
    of_node_E = num_nodes * share_E / share_E.sum()
    for wanted, devices in zip(of_node_E, placement.copies(), strict=True):
        nodes = {device // devices_per_node for device in devices}
        assert len(nodes) <= max(1, math.ceil(wanted - 1e-9))


def test_hierarchical_with_one_node_is_greedy_but_for_slots() -> None:
    for number in range(5):
        share_E = skewed(16, number)
        a, b = hierarchical(share_E, 4, 5, devices_per_node=4), greedy(share_E, 4, 5)
        assert even_load(share_E, a) == pytest.approx(even_load(share_E, b))


def test_hierarchical_balances_nodes_and_devices() -> None:
    worst = [even_load(s, hierarchical(s, 8, 10, devices_per_node=4)).max() for s in (skewed(64, n) for n in range(20))]
    assert np.median(worst) < 1.005 and max(worst) < 1.02, worst


def test_hierarchical_gives_an_expert_that_passes_a_nodes_share_to_more_nodes() -> None:
    share_E = np.array([0.7, 0.1, 0.1, 0.1])
    copies = hierarchical(share_E, 4, 3, devices_per_node=2).copies()
    assert {d // 2 for d in copies[0]} == {0, 1} and all(len({d // 2 for d in devices}) == 1 for devices in copies[1:])
    # without a spare slot it stays where it is
    assert hierarchical(share_E, 4, 1, devices_per_node=2).copies()[0] in ((0,), (1,), (2,), (3,))


def test_hierarchical_refuses_unequal_nodes() -> None:
    with pytest.raises(ValueError, match="8 devices in nodes of 3"):
        hierarchical(np.ones(8), 8, 2, devices_per_node=3)


# the optimum


@pytest.mark.parametrize(("num_experts", "num_devices", "slots_per_device"), [(4, 2, 3), (5, 3, 2), (4, 3, 2)])
def test_the_optimum_is_the_best_of_all_placements(num_experts: int, num_devices: int, slots_per_device: int) -> None:
    pytest.importorskip("scipy")
    for number in range(3):
        share_E = skewed(num_experts, number)
        placement = optimum(share_E, num_devices, slots_per_device)
        check_slots(placement, num_experts, num_devices, slots_per_device)
        best = min(smallest_largest_load(share_E, p) for p in every_placement(num_experts, num_devices, slots_per_device))
        assert smallest_largest_load(share_E, placement) == pytest.approx(best, abs=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("num_experts", "num_devices", "slots_per_device", "even_median", "even_p95"),
    [(8, 4, 2, 1.001, 1.03), (16, 4, 5, 1.03, 1.1), (16, 8, 3, 1.08, 1.2), (32, 4, 10, 1.005, 1.02)],
)
def test_greedy_is_near_the_optimum(
    num_experts: int, num_devices: int, slots_per_device: int, even_median: float, even_p95: float
) -> None:
    """Where rows are split as well as can be, it is the optimum but for a few percent; even splits cost a little more."""
    pytest.importorskip("scipy")
    even, free = [], []
    for number in range(8):
        share_E = skewed(num_experts, number)
        best = smallest_largest_load(share_E, optimum(share_E, num_devices, slots_per_device, time_limit_s=5.0))
        placement = greedy(share_E, num_devices, slots_per_device)
        even.append(even_load(share_E, placement).max() / num_devices / best)
        free.append(smallest_largest_load(share_E, placement) / best)
    assert min(free) > 1 - 1e-4 and np.median(free) < 1.005 and max(free) < 1.05, free
    assert np.median(even) < even_median and np.percentile(even, 95) < even_p95, even


def test_the_smallest_largest_load_of_a_chain() -> None:
    pytest.importorskip("scipy")
    placement = Placement(3, ((0, 1), (1, 2), (2, EMPTY)))
    assert smallest_largest_load(np.array([6.0, 0.0, 0.0]), placement) == pytest.approx(6)
    assert smallest_largest_load(np.array([4.0, 4.0, 4.0]), placement) == pytest.approx(4)
    assert smallest_largest_load(np.array([5.0, 4.0, 0.0]), placement) == pytest.approx(5)
    assert smallest_largest_load(np.array([2.0, 4.0, 6.0]), placement) == pytest.approx(4)


def test_without_scipy_the_optimum_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"scipy, which is not installed: pip install 'megalina\[dev\]'"):
        optimum(np.ones(2), 2, 1)
