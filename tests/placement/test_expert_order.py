"""The order of experts from a profile: tokens meet their experts at home, as far as there is room; its file."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalina.placement.expert_order import ExpertOrders, counts_of, local_share, order_of, read_orders, write_orders
from megalina.placement.routing_trace import read_trace, traced, write_trace


def counts(nodes: int, experts: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 1000, (nodes, experts))


def test_choices_are_counted_by_the_home_of_their_sequence() -> None:
    ids_TLK = np.array([[[0, 1]], [[2, 3]], [[0, 2]], [[3, 1]]])
    trace = traced(ids_TLK, 4, sample_lengths_S=np.array([1, 2, 1]), samples_S=np.array([4, 7, 8]))
    assert counts_of(trace, 2).tolist() == [[[1, 2, 0, 1], [1, 0, 2, 1]]]
    with pytest.raises(ValueError, match="has no numbers of its sequences, so nobody knows where they are at home"):
        counts_of(traced(ids_TLK, 4), 2)


def test_a_trace_keeps_the_numbers_of_its_sequences(tmp_path: Path) -> None:
    trace = traced(np.array([[[0]], [[1]]]), 4, sample_lengths_S=np.array([1, 1]), samples_S=np.array([5, 9]))
    write_trace(tmp_path / "trace.npz", trace)
    found = read_trace(tmp_path / "trace.npz").samples_S
    assert found is not None and found.tolist() == [5, 9]
    with pytest.raises(ValueError, match=r"samples must be integers \[1\], not int64 \[2\]"):
        traced(np.array([[[0]], [[1]]]), 4, samples_S=np.array([5, 9]))


@pytest.mark.parametrize("seed", range(5))
def test_two_nodes_get_the_best_order_there_is(seed: int) -> None:
    count_NE = counts(2, 8, seed)
    order = order_of(count_NE, 2)
    halves = (set(half) for half in itertools.combinations(range(8), 4))
    best = max(local_share(count_NE, (*half, *(set(range(8)) - half))) for half in halves)
    assert sorted(order) == list(range(8)) and local_share(count_NE, order) == pytest.approx(best)
    assert best > local_share(count_NE, tuple(range(8))) or order_of(count_NE, 4) is not None


@pytest.mark.parametrize("nodes", [3, 4])
def test_no_exchange_of_two_experts_makes_an_order_better(nodes: int) -> None:
    count_NE = counts(nodes, 12, nodes)
    order = order_of(count_NE, 1)
    best = local_share(count_NE, order)
    for i, j in itertools.combinations(range(12), 2):
        other = list(order)
        other[i], other[j] = other[j], other[i]
        assert local_share(count_NE, tuple(other)) <= best + 1e-12


def test_sequences_that_choose_apart_are_all_at_home_and_busy_experts_on_ranks_of_their_own() -> None:
    count_NE = np.array([[0, 9, 0, 8, 0, 2, 0, 1], [7, 0, 6, 0, 3, 0, 2, 0]])
    order = order_of(count_NE, 2)
    assert local_share(count_NE, order) == 1.0 and local_share(count_NE, tuple(range(8))) < 0.6
    assert order == (1, 7, 3, 5, 0, 6, 2, 4)
    with pytest.raises(ValueError, match="8 experts can't be cut into 2 nodes of 3 ranks: take a divisor"):
        order_of(count_NE, 3)


def test_a_file_is_read_as_it_was_written_and_another_is_refused(tmp_path: Path) -> None:
    orders = ExpertOrders(4, 2, {0: (3, 1, 0, 2), 2: (0, 1, 2, 3)})
    write_orders(tmp_path / "a.json", orders)
    assert read_orders(tmp_path / "a.json") == orders
    assert not orders.stays(2) and orders.stays(1) and ExpertOrders(4, 2, {0: (1, 0, 3, 2)}).stays(2)
    for text, message in (
        ("{}", "is no order of experts, as tools/place_experts.py writes one"),
        ('{"num_experts": 4, "nodes": 2, "layers": {"0": [0, 1, 2, 2]}}', "must have each of experts 0 to 3 once"),
        ('{"num_experts": 4, "nodes": 3, "layers": {"0": [0, 1, 2, 3]}}', "nodes must hold equally many experts"),
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_orders(tmp_path / "b.json")
    with pytest.raises(ValueError, match="can't be read: No such file"):
        read_orders(tmp_path / "c.json")
