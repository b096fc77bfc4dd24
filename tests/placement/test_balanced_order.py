"""Experts change places so that no rank has much more to do than another, few of them, and none without need."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from megalina.placement.balanced_order import balanced_order, changed_ranks

Loads = NDArray[np.int64]


def drawn(seed: int, experts: int, *, skew: float) -> Loads:
    """Rows of each expert; the lower `skew`, the less even."""
    random = np.random.default_rng(seed)
    return random.multinomial(40_960, random.dirichlet(np.full(experts, skew))).astype(np.int64)


def fullest_over_mean(load_E: Loads, ranks: int, order: tuple[int, ...]) -> float:
    total_R = load_E[list(order)].reshape(ranks, -1).sum(1)
    return float(total_R.max() / total_R.mean())


def best_of_two(load_E: Loads) -> float:
    """The fuller rank over the mean in the best of all orders on two ranks."""
    half, total = len(load_E) // 2, int(load_E.sum())
    sums = (int(load_E[[0, *others]].sum()) for others in combinations(range(1, len(load_E)), half - 1))
    return min(max(s, total - s) for s in sums) * 2 / total


def test_two_ranks_come_near_the_best_of_all_orders() -> None:
    over, before = [], []
    in_turn = tuple(range(8))
    for seed in range(100):
        load_E = drawn(seed, 8, skew=3.0)
        order = balanced_order(load_E, 2, in_turn)
        over.append(fullest_over_mean(load_E, 2, order) - best_of_two(load_E))
        before.append(fullest_over_mean(load_E, 2, in_turn))
    assert min(over) >= 0 and max(over) < 0.08 and np.mean(over) < 0.005
    assert np.mean(before) > 1.1


@pytest.mark.parametrize(("experts", "ranks"), [(16, 4), (64, 8), (256, 32)])
def test_many_ranks_come_near_what_the_largest_expert_allows(experts: int, ranks: int) -> None:
    over = []
    for seed in range(20):
        load_E = drawn(seed, experts, skew=1.0)
        order = balanced_order(load_E, ranks, tuple(range(experts)))
        assert sorted(order) == list(range(experts))
        over.append(fullest_over_mean(load_E, ranks, order) - max(1.0, load_E.max() * ranks / load_E.sum()))
    assert np.mean(over) < 0.06


def test_few_experts_move_and_from_where_they_are() -> None:
    load_E = np.array([40, 10, 10, 20, 10, 10, 20, 10])
    order = balanced_order(load_E, 2, (7, 6, 5, 4, 3, 2, 1, 0))  # 50 and 80
    assert fullest_over_mean(load_E, 2, order) <= 70 / 65
    assert changed_ranks((7, 6, 5, 4, 3, 2, 1, 0), order, 2) == 2
    assert balanced_order(load_E, 2, order) == order


@pytest.mark.parametrize("load", [[10] * 8, [0] * 8, [1001, 1000, 999, 1000, 1003, 998, 1001, 999]])
def test_none_moves_where_loads_are_even(load: list[int]) -> None:
    order = (3, 1, 0, 2, 7, 6, 5, 4)
    assert balanced_order(np.array(load), 4, order) == order


def test_one_rank_has_nobody_to_exchange_with() -> None:
    assert balanced_order(np.array([5, 1, 1]), 1, (2, 1, 0)) == (2, 1, 0)


def test_an_order_that_ranks_can_t_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="3 experts in the order"):
        balanced_order(np.array([5, 1, 1]), 2, (0, 1, 2))
    with pytest.raises(ValueError, match="can't be cut over 2 ranks"):
        balanced_order(np.array([5, 1, 1, 1]), 2, (0, 1, 1, 2))
