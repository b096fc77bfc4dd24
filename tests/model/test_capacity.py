"""Capacity: exact numbers, and queues against a loop."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalina.model.selection import capacity, within_capacity


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 1.25, 1.3, 2.0])
def test_capacity_is_the_exact_ceiling(factor: float) -> None:
    for top_k, num_experts in ((1, 1), (2, 8), (8, 64), (3, 10)):
        counts = list(range(300))
        exact = [math.ceil(Fraction(str(factor)) * n * top_k / num_experts) for n in counts]
        assert capacity(torch.tensor(counts), factor, top_k, num_experts).tolist() == exact


def test_rounded_products_would_give_one_too_many() -> None:
    assert math.ceil(1.1 * 50) == 56
    assert capacity(torch.tensor([50]), 1.1, 1, 1).tolist() == [55]


@given(st.data())
def test_the_first_of_each_queue_stay(data: st.DataObject) -> None:
    num_queues, count = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 20))
    queue = data.draw(st.lists(st.integers(0, num_queues - 1), min_size=count, max_size=count))
    limits = data.draw(st.lists(st.integers(0, 6), min_size=num_queues, max_size=num_queues))
    priority = data.draw(st.none() | st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=count, max_size=count))
    stay = set()
    for q in range(num_queues):
        line = [i for i in range(count) if queue[i] == q]
        if priority is not None:
            line.sort(key=lambda i: (-priority[i], i))
        stay |= set(line[: limits[q]])
    as_tensor = None if priority is None else torch.tensor(priority)
    kept = within_capacity(torch.tensor(queue, dtype=torch.int64), torch.tensor(limits), as_tensor)
    assert kept.tolist() == [i in stay for i in range(count)]
