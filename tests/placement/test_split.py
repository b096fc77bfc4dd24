"""Splits: no row is lost, none goes where its expert is not, and loads are as even as each split promises."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.placement.placement import EMPTY, Placement
from megalina.placement.planners.first_fit import FirstFit
from megalina.placement.planners.greedy import greedy
from megalina.placement.planners.identity import identity
from megalina.placement.split import Counts, device_load, even, load_aware, local_first
from placement_lab.optimum import smallest_largest_load

Split = Callable[[Counts, Placement], Counts]
SPLITS = (even, load_aware, local_first)
BALANCED = (load_aware, local_first)


@st.composite
def rows(draw: st.DrawFn, most_rows: int = 30) -> tuple[Counts, Placement]:
    """Any placement, with empty slots and experts twice on a device; few rows, many, or none."""
    num_experts, num_devices = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    slots_per_device = -(-num_experts // num_devices) + draw(st.integers(0, 2))
    slots = [*range(num_experts)]
    more = num_devices * slots_per_device - num_experts
    slots += draw(st.lists(st.integers(EMPTY, num_experts - 1), min_size=more, max_size=more))
    slots = draw(st.permutations(slots))
    by_device = tuple(tuple(slots[d * slots_per_device : (d + 1) * slots_per_device]) for d in range(num_devices))
    count = st.one_of(st.integers(0, most_rows), st.sampled_from([0, 1, 10 * most_rows]))
    size = num_devices * num_experts
    counts = draw(st.lists(count, min_size=size, max_size=size))
    return np.array(counts, np.int64).reshape(num_devices, num_experts), Placement(num_experts, by_device)


def served(number: int, num_experts: int, num_devices: int, slots_per_device: int) -> tuple[Counts, Placement]:
    """Rows of ranks that differ, and the placement that greedy makes of shares that were a bit wrong."""
    generator = np.random.default_rng((number, num_experts))
    share_E = generator.dirichlet(np.full(num_experts, 0.5))
    mixed_RE = [0.6 * share_E + 0.4 * generator.dirichlet(np.full(num_experts, 0.5)) for _ in range(num_devices)]
    count_RE = np.stack([generator.multinomial(1024, share_E) for share_E in mixed_RE])
    return count_RE, greedy(share_E, num_devices, slots_per_device)


def exact_limit(count_RE: Counts, placement: Placement) -> int:
    """The smallest largest load, from subsets of devices: what sits on these alone must be computed there."""
    count_E, copies = count_RE.sum(0), [set(devices) for devices in placement.copies()]
    limit = 0
    for chosen in product((False, True), repeat=placement.num_devices):
        devices = {d for d, there in enumerate(chosen) if there}
        if devices:
            only = sum(int(c) for c, where in zip(count_E, copies, strict=True) if where <= devices)
            limit = max(limit, -(-only // len(devices)))
    return limit


def kept(split_REN: Counts) -> int:
    """Rows that stay on their rank."""
    devices = np.arange(len(split_REN))
    return int(split_REN[devices, :, devices].sum())


@pytest.mark.parametrize("split", SPLITS)
@given(case=rows())
def test_no_row_is_lost_and_none_goes_where_its_expert_is_not(split: Split, case: tuple[Counts, Placement]) -> None:
    count_RE, placement = case
    before_RE = count_RE.copy()
    split_REN = split(count_RE, placement)
    assert split_REN.dtype == np.int64 and split_REN.shape == (*count_RE.shape, placement.num_devices)
    assert (split_REN.sum(2) == count_RE).all() and split_REN.min() >= 0
    for expert, devices in enumerate(placement.copies()):
        assert not np.delete(split_REN[:, expert], devices, axis=1).any()
    assert (split(count_RE, placement) == split_REN).all() and (count_RE == before_RE).all()
    assert device_load(split_REN).sum() == count_RE.sum()


@given(case=rows())
def test_even_parts_differ_by_one_at_most_of_each_rank_and_in_sum(case: tuple[Counts, Placement]) -> None:
    count_RE, placement = case
    split_REN = even(count_RE, placement)
    for expert, devices in enumerate(placement.copies()):
        of_expert_RC = split_REN[:, expert, list(devices)]
        assert (of_expert_RC.max(1) - of_expert_RC.min(1) <= 1).all()
        total_C = of_expert_RC.sum(0)
        assert total_C.max() - total_C.min() <= 1


def test_even_remainders_go_round() -> None:
    placement = Placement(2, ((0, 1), (0, 1), (0, 1)))
    load_N = device_load(even(np.ones((3, 2), np.int64), placement))
    assert load_N.tolist() == [2, 2, 2]
    # one row for each of three experts that all devices hold: they begin at different devices
    three = Placement(3, ((0, 1, 2),) * 3)
    assert device_load(even(np.array([[1, 1, 1], [0] * 3, [0] * 3]), three)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("split", BALANCED)
@given(case=rows())
def test_the_largest_load_is_exactly_as_small_as_it_can_be(split: Split, case: tuple[Counts, Placement]) -> None:
    count_RE, placement = case
    assert device_load(split(count_RE, placement)).max() == exact_limit(count_RE, placement)


@pytest.mark.parametrize("split", BALANCED)
@pytest.mark.parametrize("shape", [(16, 4, 5), (64, 8, 10), (64, 8, 8), (32, 16, 3)])
def test_the_largest_load_is_that_of_the_linear_program_rounded_up(split: Split, shape: tuple[int, int, int]) -> None:
    pytest.importorskip("scipy")
    for number in range(6):
        count_RE, placement = served(number, *shape)
        limit = np.ceil(smallest_largest_load(count_RE.sum(0).astype(np.float64), placement) - 1e-6)
        assert device_load(split(count_RE, placement)).max() == limit
        assert limit <= device_load(even(count_RE, placement)).max()


@pytest.mark.parametrize("split", BALANCED)
def test_rows_go_round_several_corners(split: Split) -> None:
    """A chain of devices that each share one expert with the next: what is too much at one end must pass through all."""
    chain = Placement(5, ((0, 1), (1, 2), (2, 3), (3, 4), (4, EMPTY)))
    count_RE = np.zeros((5, 5), np.int64)
    count_RE[0] = [20, 20, 20, 20, 20]
    assert device_load(split(count_RE, chain)).tolist() == [20] * 5
    count_RE[0] = [50, 10, 10, 10, 20]  # nothing can be done about the first one
    assert device_load(split(count_RE, chain)).max() == 50


@given(case=rows())
def test_local_first_keeps_all_rows_where_that_raises_no_load(case: tuple[Counts, Placement]) -> None:
    count_RE, placement = case
    split_REN = local_first(count_RE, placement)
    own = sum(int(count_RE[d, e]) for e, devices in enumerate(placement.copies()) for d in devices)
    assert kept(split_REN) <= own
    for expert, devices in enumerate(placement.copies()):
        if all(rank in devices for rank in range(placement.num_devices) if count_RE[rank, expert]) or len(devices) == 1:
            continue
        return  # rows that must choose between devices
    all_kept_REN = np.zeros_like(split_REN)
    for expert, devices in enumerate(placement.copies()):
        for rank in range(placement.num_devices):
            all_kept_REN[rank, expert, rank if rank in devices else devices[0]] = count_RE[rank, expert]
    if device_load(all_kept_REN).max() == exact_limit(count_RE, placement):
        assert (split_REN == all_kept_REN).all()


def most_kept(count_RE: Counts, placement: Placement, limit: int) -> float:
    """The most rows that can stay on their rank with no device above the limit: a linear program."""
    optimize = pytest.importorskip("scipy.optimize")
    own, unknowns = [], []
    for expert, devices in enumerate(placement.copies()):
        for device in devices:
            unknowns += [(expert, device, True), (expert, device, False)]
            own += [int(count_RE[device, expert]), None]
    sum_EP, sum_NP = np.zeros((placement.num_experts, len(unknowns))), np.zeros((placement.num_devices, len(unknowns)))
    for p, (expert, device, _) in enumerate(unknowns):
        sum_EP[expert, p] = sum_NP[device, p] = 1
    goal = [-1.0 if is_own else 0.0 for _, _, is_own in unknowns]
    limits = np.full(placement.num_devices, limit)
    bounds = [(0, most) for most in own]
    found = optimize.linprog(goal, A_ub=sum_NP, b_ub=limits, A_eq=sum_EP, b_eq=count_RE.sum(0), bounds=bounds)
    return float(-found.fun)


@pytest.mark.parametrize("shape", [(16, 4, 5), (64, 8, 10), (32, 16, 3)])
def test_local_first_keeps_nearly_as_many_rows_as_is_possible(shape: tuple[int, int, int]) -> None:
    shares, gained = [], []
    for number in range(6):
        count_RE, placement = served(number, *shape)
        split_REN = local_first(count_RE, placement)
        most = most_kept(count_RE, placement, int(device_load(split_REN).max()))
        assert kept(split_REN) <= most + 1e-6
        shares.append(kept(split_REN) / most)
        gained.append(kept(split_REN) / max(1, kept(load_aware(count_RE, placement))))
    assert min(shares) > 0.97 and np.median(shares) > 0.99, shares
    assert min(gained) > 1 and np.median(gained) > 1.1, gained


@pytest.mark.parametrize("split", SPLITS)
def test_in_training_layout_there_is_nothing_to_choose(split: Split) -> None:
    count_RE = np.arange(16).reshape(4, 4)
    split_REN = split(count_RE, identity(np.ones(4), 4, 2))
    assert all((split_REN[:, e, e] == count_RE[:, e]).all() for e in range(4))


@pytest.mark.parametrize("split", BALANCED)
def test_mirrored_devices_have_as_much_to_do(split: Split) -> None:
    for number in range(5):
        count_RE, placement = served(number, 16, 4, 5)
        mirrored = Placement(16, placement.slots[::-1])
        loads = device_load(split(count_RE, placement)).max(), device_load(split(count_RE[::-1], mirrored)).max()
        assert loads[0] == loads[1]


def test_first_fits_replicas_of_unequal_size_want_a_split_that_sees_loads() -> None:
    share_E = np.array([0.55, 0.15, 0.2, 0.1])
    placement = FirstFit()(share_E, 4, 3)
    count_RE = np.tile((1000 * share_E).round().astype(np.int64), (4, 1))
    assert device_load(load_aware(count_RE, placement)).max() < 0.97 * device_load(even(count_RE, placement)).max()


@pytest.mark.parametrize("split", SPLITS)
def test_counts_that_do_not_fit_are_refused(split: Split) -> None:
    placement = identity(np.ones(4), 2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 3\): \(ranks, experts\) of the placement are \(2, 4\)"):
        split(np.zeros((2, 3), np.int64), placement)
    with pytest.raises(ValueError, match="at least -1: give integers from 0 on"):
        split(np.full((2, 4), -1), placement)
    with pytest.raises(ValueError, match="type float64"):
        split(np.zeros((2, 4)), placement)  # type: ignore[arg-type]
