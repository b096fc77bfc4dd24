"""The linear layer against F.linear, and where its gradients go."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.model.linear import linear, linears


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_equals_torch_for_any_leading_dims(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = draw(*shape, dtype=dtype), draw(6, 3, dtype=dtype, seed=1), draw(6, dtype=dtype, seed=2)
    for args in ((x, weight, bias), (x, weight)):
        ours, theirs = linear(*args), F.linear(*args)
        torch.testing.assert_close(ours, theirs)
        dy = draw(*ours.shape, dtype=dtype, seed=3).detach()
        for a, b in zip(torch.autograd.grad(ours, args, dy), torch.autograd.grad(theirs, args, dy), strict=True):
            torch.testing.assert_close(a, b)


def test_linear_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(linear, (draw(4, 3), draw(5, 3, seed=1), draw(5, seed=2)))


def test_linear_reads_a_transposed_input() -> None:
    x, weight = draw(3, 4).t(), draw(5, 3, seed=1)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype, main_dtype", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_main_gradients_collect_every_use_of_a_parameter(dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    weight, bias = draw(5, 3, dtype=dtype, seed=1), draw(5, dtype=dtype, seed=2)
    weight.main_grad = torch.ones(5, 3, dtype=main_dtype)
    bias.main_grad = torch.ones(5, dtype=main_dtype)
    plain = [weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()]
    expected = [torch.ones(5, 3, dtype=main_dtype), torch.ones(5, dtype=main_dtype)]
    for use in range(3):
        x, dy = draw(4, 3, dtype=dtype, seed=use), draw(4, 5, dtype=dtype, seed=10 + use).detach()
        linear(x, weight, bias).backward(dy)
        for total, grad in zip(expected, torch.autograd.grad(F.linear(x, *plain), plain, dy), strict=True):
            total += grad
    assert weight.grad is None and bias.grad is None
    torch.testing.assert_close(weight.main_grad, expected[0])
    # a bfloat16 bias gradient is summed in float32 here, and rounded once by torch
    torch.testing.assert_close(bias.main_grad, expected[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-12, atol=1e-12)


def test_main_gradient_may_be_a_view_into_a_flat_buffer() -> None:
    flat = torch.zeros(20, dtype=torch.float64)
    weight = draw(5, 3, seed=1)
    weight.main_grad = flat[2:17].view(5, 3)
    x = draw(4, 3)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(flat[2:17].view(5, 3), x.detach().sum(0).expand(5, 3))
    assert flat[:2].eq(0).all() and flat[17:].eq(0).all()


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (0, 3)])
@pytest.mark.parametrize("into_main", [False, True])
def test_several_weights_of_one_input_are_as_each_alone(shape: tuple[int, ...], into_main: bool) -> None:
    x = draw(*shape)
    weights, biases = [draw(n, 3, seed=n) for n in (6, 2, 4)], [draw(6, seed=20), None, draw(4, seed=21)]
    given = [x, *weights, *(b for b in biases if b is not None)]
    alone = [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    dys = [draw(*y.shape, seed=30).detach() for y in alone]
    expected = torch.autograd.grad(alone, given, dys)
    together = linears(x, weights, biases)
    torch.testing.assert_close(together, tuple(alone), rtol=0, atol=0)
    if into_main:
        for parameter in given[1:]:
            parameter.main_grad = torch.ones_like(parameter)
    torch.autograd.backward(linears(x, weights, biases), dys)
    for parameter, gradient in zip(given, expected, strict=True):
        if into_main and parameter is not x:
            assert parameter.grad is None
            torch.testing.assert_close(parameter.main_grad, gradient + 1)
        else:
            torch.testing.assert_close(parameter.grad, gradient)


def test_several_weights_pass_gradcheck_where_some_need_no_gradient() -> None:
    x, weights = draw(4, 3), [draw(2, 3, seed=1), draw(5, 3, seed=2).detach()]
    assert torch.autograd.gradcheck(lambda *inputs: linears(inputs[0], inputs[1:], (None, None)), (x, *weights))
