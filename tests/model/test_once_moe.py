"""Tokens that travel once to each rank against rows that travel one by one: the same sums and gradients, fewer rows, all bits."""

import math

import pytest
import torch
from torch import Tensor

from megalina.blocks.activation import Activation
from megalina.model.experts import expert_mlp
from megalina.model.once_moe import NOT_CHOSEN, _Pack, _Unpack, chosen, columns_of, pack_order, weights_of
from megalina.model.permute import permute, row_order, unpermute

TOKENS, EXPERTS, WIDTH, HIDDEN = 11, 8, 6, 5


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def choices(top_k: int, *, dropped: bool = False) -> Tensor:
    """Each token's experts, different ones; with `dropped` some are nobody."""
    generator = torch.Generator().manual_seed(top_k)
    expert_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(TOKENS)])
    return expert_TK.where(torch.rand(TOKENS, top_k, generator=generator) > 0.3 * dropped, EXPERTS)


def in_rows(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w1: Tensor, w2: Tensor, activation: Activation) -> Tensor:
    order = row_order(expert_TK, EXPERTS)
    y_ND = expert_mlp(permute(x_TD, order), order.count_E.tolist(), w1, w2, activation=activation)
    return unpermute(torch.zeros_like(x_TD), y_ND, weight_TK, order)


def once(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w1: Tensor, w2: Tensor, activation: Activation, ranks: int
) -> tuple[Tensor, int]:
    """The sums, and how many rows travelled; `ranks` computed one after another."""
    here = EXPERTS // ranks
    order = row_order(expert_TK, EXPERTS)
    way, source_U, slot_TK = pack_order(order, here)
    sent_UC = _Pack.apply(permute(x_TD, order), weight_TK, source_U, slot_TK, here)
    back = []
    for rank, got_UC in enumerate(sent_UC.split(way.count_E.tolist())):
        got_UD, weight_Ue = _Unpack.apply(got_UC, x_TD.shape[1], weight_TK.dtype)
        weight_Uk, own = chosen(weight_Ue, min(here, expert_TK.shape[1]))
        experts = slice(rank * here, (rank + 1) * here)
        y_ND = expert_mlp(permute(got_UD, own), own.count_E.tolist(), w1[experts], w2[experts], activation=activation)
        back.append(unpermute(torch.zeros_like(got_UD), y_ND, weight_Uk, own))
    ones_TK = torch.ones(way.row_TK.shape, dtype=weight_TK.dtype)
    return unpermute(torch.zeros_like(x_TD), torch.cat(back), ones_TK, way), len(sent_UC)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_sums_and_gradients_are_those_of_rows(top_k: int, ranks: int, dropped: bool) -> None:
    expert_TK, activation = choices(top_k, dropped=dropped), Activation("swiglu")
    leaves = [
        *(drawn(TOKENS, WIDTH, seed=1), drawn(TOKENS, top_k, seed=2)),
        *(drawn(EXPERTS, 2 * HIDDEN, WIDTH, seed=3), drawn(EXPERTS, WIDTH, HIDDEN, seed=4)),
    ]
    x_TD, weight_TK, w1, w2 = leaves
    want = in_rows(x_TD, weight_TK, expert_TK, w1, w2, activation)
    got, rows = once(x_TD, weight_TK, expert_TK, w1, w2, activation, ranks)
    assert rows == sum(len({int(e) * ranks // EXPERTS for e in of if e < EXPERTS}) for of in expert_TK)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    upstream = drawn(TOKENS, WIDTH, seed=5).detach()
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_weight_of_zero_is_a_choice_and_has_a_gradient() -> None:
    """And one that is no number stays none."""
    weight_Ue = torch.tensor([[0.0, NOT_CHOSEN], [math.nan, 0.5]])
    found_Uk, order = chosen(weight_Ue, 2)
    assert order.count_E.tolist() == [2, 1] and found_Uk[0].tolist() == [0.0, 0.0] and math.isnan(found_Uk[1, 0])


def test_weights_that_are_wider_than_rows_keep_their_bits_both_ways() -> None:
    expert_TK = choices(2)
    order = row_order(expert_TK, EXPERTS)
    way, source_U, slot_TK = pack_order(order, 4)
    x_TD, weight_TK = drawn(TOKENS, WIDTH, seed=1, dtype=torch.bfloat16), drawn(TOKENS, 2, seed=2, dtype=torch.float32)
    sent_UC = _Pack.apply(permute(x_TD, order), weight_TK, source_U, slot_TK, 4)
    assert sent_UC.dtype == torch.bfloat16 and sent_UC.shape == (len(way.token_N), WIDTH + 8)
    got_UD, weight_Ue = _Unpack.apply(sent_UC, WIDTH, torch.float32)
    assert torch.equal(got_UD, x_TD[way.token_N])
    assert sorted(weight_Ue[weight_Ue != NOT_CHOSEN].tolist()) == sorted(weight_TK.flatten().tolist())
    weight_Ue.where(weight_Ue != NOT_CHOSEN, 0.0).mul(1 + 2**-20).sum().backward()
    assert torch.equal(weight_TK.grad, torch.full_like(weight_TK, 1 + 2**-20))
    numbers = drawn(3, 4, seed=7, dtype=torch.float32).detach()
    assert torch.equal(weights_of(columns_of(numbers, torch.bfloat16), torch.float32), numbers)


def test_one_expert_a_rank_gives_the_same_bits() -> None:
    expert_TK, activation = choices(3), Activation("swiglu")
    x_TD, weight_TK = drawn(TOKENS, WIDTH, seed=1), drawn(TOKENS, 3, seed=2)
    w1, w2 = drawn(EXPERTS, 2 * HIDDEN, WIDTH, seed=3), drawn(EXPERTS, WIDTH, HIDDEN, seed=4)
    got, _ = once(x_TD, weight_TK, expert_TK, w1, w2, activation, EXPERTS)
    torch.testing.assert_close(got, in_rows(x_TD, weight_TK, expert_TK, w1, w2, activation), rtol=0, atol=0)
