"""The watch over experts' load says how even it is, what is dropped, and who is dead."""

import math

import pytest
import torch

from megalina.train.guard import WINDOW_STEPS, LoadWatch


def loads(*rows: list[int]) -> torch.Tensor:
    """One row a layer: tokens of each expert, then choices lost."""
    return torch.tensor(rows, dtype=torch.int64)


def test_shares_maximum_and_entropy_are_those_of_plain_arithmetic() -> None:
    report = LoadWatch(3, 4).report(1, loads([5, 5, 5, 5, 0], [20, 0, 0, 0, 5], [8, 4, 2, 6, 1]))
    assert report.expert_load == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.4, 0.2, 0.1, 0.3]]
    assert report.load_max_over_mean == pytest.approx([1.0, 4.0, 1.6])
    entropy = -sum(p * math.log(p) for p in (0.4, 0.2, 0.1, 0.3)) / math.log(4)
    assert report.load_entropy == pytest.approx([1.0, 0.0, entropy])
    assert report.dropped_fraction == pytest.approx([0.0, 0.25, 0.05])


def test_an_expert_is_dead_after_a_window_without_a_token_and_alive_with_the_next() -> None:
    watch = LoadWatch(1, 2)
    dead = []
    for step in range(1, 2 * WINDOW_STEPS + 1):
        idle = 10 < step < WINDOW_STEPS + 50
        dead.append(watch.report(step, loads([4, 0 if idle else 1, 0])).dead_experts)
    assert [step for step, d in enumerate(dead, 1) if d == [1]] == list(range(10 + WINDOW_STEPS, WINDOW_STEPS + 50))
    assert [1] in dead and [0] in dead


def test_an_expert_that_never_gets_a_token_is_dead_once_the_window_is_over() -> None:
    watch = LoadWatch(1, 2)
    assert [watch.report(step, loads([4, 0, 0])).dead_experts for step in (1, WINDOW_STEPS - 1, WINDOW_STEPS)] == [[0], [0], [1]]


def test_the_state_goes_on_in_another_watch() -> None:
    first = LoadWatch(2, 2)
    first.report(30, loads([1, 0, 0], [0, 1, 0]))
    second = LoadWatch(2, 2)
    second.load(first.state())
    later = loads([1, 0, 0], [1, 0, 0])
    assert second.report(130, later) == first.report(130, later)
    assert second.state() == [[130, 0], [130, 30]]


def test_a_layer_without_tokens_divides_by_nothing() -> None:
    report = LoadWatch(1, 3).report(1, loads([0, 0, 0, 0]))
    assert report.expert_load == [[0.0] * 3] and report.load_entropy == [0.0] and report.dropped_fraction == [0.0]


def test_a_model_without_experts_has_nothing_to_report() -> None:
    report = LoadWatch(0, 4).report(1, torch.zeros(0, 5, dtype=torch.int64))
    assert (report.load_max_over_mean, report.load_entropy, report.dropped_fraction, report.dead_experts) == ([], [], [], [])


def test_a_single_expert_is_even_load() -> None:
    report = LoadWatch(1, 1).report(1, loads([7, 0]))
    assert report.load_max_over_mean == [1.0] and report.expert_load == [[1.0]] and report.load_entropy == [0.0]
