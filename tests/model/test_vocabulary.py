"""The vocabulary's statistics give PyTorch's cross entropy, however the vocabulary is cut.

Shapes: T tokens, V words, R ranks.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.model.vocabulary import cross_entropy, head_stat

WORDS, PADDED, TOKENS = 13, 16, 9


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_TV = 4 * torch.randn(TOKENS, PADDED, generator=generator, dtype=torch.float64)
    return logits_TV.to(dtype).requires_grad_(), torch.randint(0, WORDS, (TOKENS,), generator=generator)


def stat_of(logits_TV: Tensor, begin: int, end: int, label_T: Tensor, words: int) -> Tensor:
    """Of words begin .. end - 1: the logits are their own head's input."""
    head_VD = torch.eye(logits_TV.shape[1], dtype=logits_TV.dtype)[begin:end]
    return head_stat(logits_TV, head_VD, label_T, words)


def cut_loss(logits_TV: Tensor, label_T: Tensor, ranks: int) -> Tensor:
    width = PADDED // ranks
    stats = []
    for r in range(ranks):
        words = min(max(WORDS - r * width, 0), width)
        stats.append(stat_of(logits_TV, r * width, (r + 1) * width, label_T - r * width, words))
    return cross_entropy(torch.stack(stats))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])  # of 8 ranks the last holds padding alone
def test_any_cut_gives_the_cross_entropy_and_its_gradient(ranks: int) -> None:
    logits_TV, label_T = example()
    weight_T = torch.linspace(0.5, 2, TOKENS, dtype=torch.float64)
    want_T = F.cross_entropy(logits_TV[:, :WORDS], label_T, reduction="none")
    (want,) = torch.autograd.grad((want_T * weight_T).sum(), logits_TV)
    got_T = cut_loss(logits_TV, label_T, ranks)
    (got,) = torch.autograd.grad((got_T * weight_T).sum(), logits_TV)
    torch.testing.assert_close(got_T, want_T, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    assert not got[:, WORDS:].any()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(4, marks=pytest.mark.full)])
def test_the_gradient_is_that_of_finite_differences(ranks: int) -> None:
    logits_TV, label_T = example()
    assert torch.autograd.gradcheck(lambda x: cut_loss(x, label_T, ranks), (logits_TV,))


def test_padding_counts_nothing_whatever_it_holds() -> None:
    logits_TV, label_T = example()
    loud_TV = logits_TV.detach().clone()
    loud_TV[:, WORDS:] = 1e6
    assert torch.equal(cut_loss(loud_TV, label_T, 2), cut_loss(logits_TV, label_T, 2))


def test_bfloat16_logits_are_summed_in_float32_and_get_bfloat16_gradients() -> None:
    logits_TV, label_T = example(torch.bfloat16)
    loss_T = cut_loss(logits_TV, label_T, 1)
    assert loss_T.dtype == torch.float32
    wide_TV = logits_TV.detach().float().requires_grad_()
    want_T = F.cross_entropy(wide_TV[:, :WORDS], label_T, reduction="none")
    torch.testing.assert_close(loss_T, want_T, rtol=1e-6, atol=1e-6)
    loss_T.sum().backward()
    want_T.sum().backward()
    assert logits_TV.grad is not None and logits_TV.grad.dtype == torch.bfloat16 and wide_TV.grad is not None
    torch.testing.assert_close(logits_TV.grad.float(), wide_TV.grad, rtol=2**-8, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits_TV = torch.tensor([[1e4, 1e4 - 1, -1e4, 0.0]], requires_grad=True)
    loss = cross_entropy(stat_of(logits_TV, 0, 4, torch.tensor([1]), 4).unsqueeze(0))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.3132617, abs=1e-3) and logits_TV.grad is not None and logits_TV.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weight_gradient_goes_to_its_buffer_and_adds_up(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    n_TD = torch.randn(TOKENS, 8, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(PADDED, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    label_T = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    (want,) = torch.autograd.grad(cross_entropy(head_stat(n_TD, weight_VD, label_T, WORDS).unsqueeze(0)).sum(), weight_VD)
    buffer = torch.ones(PADDED, 8, dtype=torch.promote_types(dtype, torch.float32))
    weight_VD.main_grad = buffer  # type: ignore[attr-defined]
    cross_entropy(head_stat(n_TD, weight_VD, label_T, WORDS).unsqueeze(0)).sum().backward()
    assert weight_VD.grad is None
    torch.testing.assert_close(buffer, 1 + want.to(buffer.dtype), rtol=1e-14, atol=1e-14)


def test_a_second_backward_through_the_same_graph_gives_the_same() -> None:
    logits_TV, label_T = example()
    loss = cut_loss(logits_TV, label_T, 2).sum()
    (first,) = torch.autograd.grad(loss, logits_TV, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits_TV)
    torch.testing.assert_close(second, first, rtol=1e-14, atol=1e-14)
