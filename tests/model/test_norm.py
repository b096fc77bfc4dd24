"""RMSNorm and LayerNorm against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.model.norm import layer_norm, rms_norm


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 6), (0, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_equal_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = draw(*shape, dtype=dtype), draw(6, dtype=dtype, seed=1), draw(6, dtype=dtype, seed=2)
    dy = draw(*shape, dtype=dtype, seed=3).detach()
    cases = [
        ((x, weight), rms_norm(x, weight, 1e-3), F.rms_norm(x, (6,), weight, 1e-3)),
        ((x, weight, bias), layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (6,), weight, bias, 1e-3)),
        ((x, weight), layer_norm(x, weight, None, 1e-3), F.layer_norm(x, (6,), weight, None, 1e-3)),
    ]
    for args, ours, theirs in cases:
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours, args, dy), torch.autograd.grad(theirs, args, dy), strict=True):
            torch.testing.assert_close(a, b)


def test_norms_pass_gradcheck() -> None:
    x, weight, bias = draw(4, 6), draw(6, seed=1), draw(6, seed=2)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, 1e-5), (x, weight, bias))


def test_a_view_of_queries_and_keys_can_be_normalised() -> None:
    x = draw(2, 3, 5, 6)[:, :, 1:4]
    weight = draw(6, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (6,), weight, 1e-5))
    torch.testing.assert_close(layer_norm(x, weight, weight, 1e-5), F.layer_norm(x, (6,), weight, weight, 1e-5))


def test_bfloat16_statistics_are_taken_in_float32() -> None:
    x, weight = draw(8, 512, dtype=torch.bfloat16), draw(512, dtype=torch.bfloat16, seed=1)
    right = F.rms_norm(x.double(), (512,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), right, rtol=2**-8, atol=1e-6)  # one rounding
    dy = draw(8, 512, dtype=torch.bfloat16, seed=2).detach()
    for got, expected in zip(
        torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), dy),
        torch.autograd.grad(right, (x, weight), dy.double()),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype, main_dtype", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_main_gradients_collect_every_use_of_a_norm(dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    weight, bias = draw(6, dtype=dtype, seed=1), draw(6, dtype=dtype, seed=2)
    weight.main_grad, bias.main_grad = torch.zeros(6, dtype=main_dtype), torch.zeros(6, dtype=main_dtype)
    right = [p.detach().double().requires_grad_() for p in (weight, bias)]
    for seed in (3, 4):
        x = draw(4, 6, dtype=dtype, seed=seed)
        rms_norm(x, weight, 1e-5).sum().backward()
        layer_norm(x, weight, bias, 1e-5).sum().backward()
        (F.rms_norm(x.double(), (6,), right[0], 1e-5).sum() + F.layer_norm(x.double(), (6,), *right, 1e-5).sum()).backward()
    assert weight.grad is None and bias.grad is None
    rtol = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(weight.main_grad.double(), right[0].grad, rtol=rtol, atol=rtol)
    torch.testing.assert_close(bias.main_grad.double(), right[1].grad, rtol=rtol, atol=rtol)
