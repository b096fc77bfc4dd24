"""The order of rows against loops over assignments."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalina.model.permute import permute, regroup_index, reorder, row_order, unpermute

NOBODY = 4  # the number of experts in these tests


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assignments(tokens: int, top_k: int, seed: int, dropped: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, NOBODY + dropped, (tokens, top_k), generator=generator)


CASES = [
    assignments(7, 2, 0, False),
    assignments(9, 3, 1, True),
    torch.full((3, 2), NOBODY),
    torch.empty(0, 2, dtype=torch.int64),
]


@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_rows_are_sorted_by_expert_then_token(tokens: int, top_k: int, seed: int, dropped: bool) -> None:
    expert = assignments(tokens, top_k, seed, dropped)
    order = row_order(expert, NOBODY)
    rows = [(e, t, k) for e in range(NOBODY) for t in range(tokens) for k in range(top_k) if expert[t, k] == e]
    assert order.token_N.tolist() == [t for _, t, _ in rows]
    assert order.slot_N.tolist() == [t * top_k + k for _, t, k in rows]
    assert order.count_E.tolist() == [sum(e == row[0] for row in rows) for e in range(NOBODY)]
    for t in range(tokens):
        for k in range(top_k):
            e = int(expert[t, k])
            assert int(order.row_TK[t, k]) == (len(rows) if e == NOBODY else rows.index((e, t, k)))


def plain_unpermute(residual: Tensor, rows: Tensor, weight: Tensor, row_TK: Tensor) -> Tensor:
    out = []
    for t in range(len(residual)):
        total = residual[t]
        for k in range(row_TK.shape[1]):
            if row_TK[t, k] < len(rows):
                total = total + weight[t, k] * rows[row_TK[t, k]]
        out.append(total)
    return torch.stack(out) if out else residual


@pytest.mark.parametrize("expert", CASES)
def test_permute_equals_indexing(expert: Tensor) -> None:
    order = row_order(expert, NOBODY)
    x = draw(len(expert), 5)
    rows = permute(x, order)
    torch.testing.assert_close(rows, x[order.token_N])
    dy = draw(*rows.shape, seed=1).detach()
    torch.testing.assert_close(torch.autograd.grad(rows, x, dy), torch.autograd.grad(x[order.token_N], x, dy))


@pytest.mark.parametrize("expert", CASES)
def test_unpermute_equals_a_loop_over_assignments(expert: Tensor) -> None:
    order = row_order(expert, NOBODY)
    args = draw(len(expert), 5), draw(len(order.token_N), 5, seed=1), draw(*expert.shape, seed=2)
    ours, theirs = unpermute(*args, order), plain_unpermute(*args, order.row_TK)
    torch.testing.assert_close(ours, theirs)
    dy = draw(*ours.shape, seed=3).detach()
    theirs_grad = torch.autograd.grad(theirs, args, dy, allow_unused=True)
    for a, b, arg in zip(torch.autograd.grad(ours, args, dy), theirs_grad, args, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(arg) if b is None else b)


@pytest.mark.parametrize("expert", CASES[:2])
def test_there_and_back_passes_gradcheck(expert: Tensor) -> None:
    order = row_order(expert, NOBODY)

    def both(x: Tensor, weight: Tensor) -> Tensor:
        return unpermute(x, permute(x, order).sin(), weight, order)

    assert torch.autograd.gradcheck(both, (draw(len(expert), 3), draw(*expert.shape, seed=1)))


@pytest.mark.parametrize("expert", CASES)
def test_weights_stay_in_float32_over_bfloat16_rows(expert: Tensor) -> None:
    order = row_order(expert, NOBODY)
    args = (
        draw(len(expert), 5, dtype=torch.bfloat16),
        draw(len(order.token_N), 5, dtype=torch.bfloat16, seed=1),
        draw(*expert.shape, dtype=torch.float32, seed=2),
    )
    ours = unpermute(*args, order)
    wide = [a.detach().double().requires_grad_() for a in args]
    theirs = plain_unpermute(*wide, order.row_TK)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=2**-8)
    dy = draw(*ours.shape, dtype=torch.bfloat16, seed=3).detach()
    grads = torch.autograd.grad(ours, args, dy)
    right = torch.autograd.grad(theirs, wide, dy.double(), allow_unused=True)
    for got, expected, arg, rtol in zip(grads, right, args, (0, 2**-8, 1e-5), strict=True):
        assert got.dtype == arg.dtype
        wanted = torch.zeros_like(got).double() if expected is None else expected
        torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4))
def test_regrouping_sorts_by_expert_then_source(counts: list[list[int]]) -> None:
    labels = [(e, r, i) for r, per_expert in enumerate(counts) for e, n in enumerate(per_expert) for i in range(n)]
    index, inverse = regroup_index(counts)
    assert [labels[i] for i in index.tolist()] == sorted(labels)
    assert index[inverse].tolist() == list(range(len(labels)))


def test_reorder_goes_back_with_the_inverse() -> None:
    index, inverse = regroup_index([[2, 1], [2, 3]])
    x = draw(8, 2)
    torch.testing.assert_close(reorder(reorder(x, index, inverse), inverse, index), x)
    assert torch.autograd.gradcheck(lambda x: reorder(x, index, inverse), (x,))
