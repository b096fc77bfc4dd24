"""The rotary embedding against a complex product."""

import pytest
import torch
from torch import Tensor

from megalina.model.rope import rope_table, rotate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def turned(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + d/2) as complex numbers, times exp(i * angle)."""
    half = x.shape[-1] // 2
    angle = position.double()[..., None, None] * theta ** (-torch.arange(half).double() / half)
    product = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([product.real, product.imag], -1)


def test_rotation_equals_a_complex_product_at_any_positions() -> None:
    x, position = draw(2, 5, 3, 8), torch.randint(0, 20, (2, 5))
    cos, sin = rope_table(20, 8, 100.0)
    ours, theirs = rotate(x, cos[position], sin[position]), turned(x, position, 100.0)
    torch.testing.assert_close(ours, theirs)
    dy = draw(*x.shape, seed=1).detach()
    torch.testing.assert_close(torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy))


def test_rotation_passes_gradcheck_on_a_view() -> None:
    cos, sin = rope_table(4, 4, 10.0)
    x = draw(1, 4, 5, 4)
    assert torch.autograd.gradcheck(lambda x: rotate(x[:, :, 1:4], cos[None], sin[None]), (x,))


def test_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rope_table(30, 8, 10000.0)
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def score(query_at: int, key_at: int) -> Tensor:
        turned_q, turned_k = (rotate(x, cos[None, p : p + 1], sin[None, p : p + 1]) for x, p in ((q, query_at), (k, key_at)))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(25, 21))
    assert not torch.isclose(score(7, 3), score(7, 4))


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be even, got 7"):
        rope_table(4, 7, 10000.0)
