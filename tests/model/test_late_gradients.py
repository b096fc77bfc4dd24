"""Gradients of weights that a backward pass left out: one product of the rows of all parts gives what each part's would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalina.blocks.activation import Activation
from megalina.model.all_experts import all_experts_mlp
from megalina.model.experts import expert_mlp, mlp
from megalina.model.late_gradients import LateGradient, Later, joined
from megalina.model.linear import linear, linears, wide_linear
from megalina.model.vocabulary import head_stat

D, F, E, VOCAB = 6, 8, 3, 10
PARTS = (4, 7, 1)  # rows of each


def parameter(*shape: int) -> nn.Parameter:
    out = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    out.main_grad = torch.zeros_like(out.data)  # type: ignore[attr-defined]
    return out


Made = tuple[list[nn.Parameter], Callable[[Tensor, Later], Tensor]]


def a_linear() -> Made:
    weights = [parameter(F, D), parameter(F)]
    return weights, lambda x, later: linear(x, *weights, later=later)


def three_linears() -> Made:
    weights = [parameter(F, D) for _ in range(3)]
    return weights, lambda x, later: torch.cat(linears(x, weights, [None] * 3, later=later), 1)


def a_wide_linear() -> Made:
    weights = [parameter(E, D)]
    return weights, lambda x, later: wide_linear(x, weights[0], later=later)


def an_mlp() -> Made:
    weights = [parameter(F, D), parameter(D, F), parameter(F), parameter(D)]
    return weights, lambda x, later: mlp(x, *weights, activation=Activation("gelu"), later=later)


def experts() -> Made:
    """With as many rows of each as come, one of them with none in the last part."""
    weights = [parameter(E, 2 * F, D), parameter(E, D, F), parameter(E, 2 * F), parameter(E, D)]

    def run(x: Tensor, later: Later) -> Tensor:
        counts = [len(x) // 2, 0 if len(x) < 2 else 1]
        return expert_mlp(x, [*counts, len(x) - sum(counts)], *weights, activation=Activation("swiglu"), later=later)

    return weights, run


def all_experts() -> Made:
    weights = [parameter(E, F, D), parameter(E, D, F), parameter(E, F), parameter(E, D)]

    def run(x: Tensor, later: Later) -> Tensor:
        return all_experts_mlp(x, x[:, :E].detach().softmax(1), *weights, activation=Activation("relu"), later=later)

    return weights, run


def a_head() -> Made:
    weights = [parameter(VOCAB, D)]
    return weights, lambda x, later: head_stat(x, weights[0], torch.arange(len(x)), VOCAB, later=later)


@pytest.mark.parametrize("made", [a_linear, three_linears, a_wide_linear, an_mlp, experts, all_experts, a_head])
def test_one_product_for_all_parts_gives_what_each_part_would(made: Callable[[], Made]) -> None:
    torch.manual_seed(0)
    weights, run = made()
    of_parts: list[Later] = []
    for rows in PARTS:
        x = torch.randn(rows, D, dtype=torch.float64, requires_grad=True)
        of_parts.append([])
        run(x, of_parts[-1]).square().sum().backward()
        assert all(w.grad is None and not w.main_grad.any() for w in weights)
    found = []
    for together in (False, True):
        for products in zip(*of_parts, strict=True):
            for late in [joined(products)] if together else products:
                with torch.no_grad():
                    late()
        found.append([w.main_grad.clone() for w in weights])
        for w in weights:
            w.main_grad.zero_()
    for apart, at_once in zip(*found, strict=True):
        assert apart.any()
        torch.testing.assert_close(at_once, apart, rtol=1e-12, atol=1e-12)


def test_experts_rows_stay_sorted_by_expert() -> None:
    """Each expert's of all parts, one after another."""
    taken: list[tuple[Tensor, list[int]]] = []
    rows_of_parts = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0]])

    def add(*given: Any) -> None:
        taken.append(given)  # type: ignore[arg-type]

    parts = [LateGradient(add, (rows,), count_E) for rows, count_E in zip(rows_of_parts, ([1, 2], [2, 0]), strict=True)]
    joined(parts)()
    ((rows, count_E),) = taken
    assert rows.flatten().tolist() == [1.0, 4.0, 5.0, 2.0, 3.0] and count_E == [3, 2]
