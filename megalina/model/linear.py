"""The linear layer whose weight gradient is added in place by its own GEMM.

Gradients of a step live in flat buffers.  A parameter with an attribute `main_grad` (a tensor of its shape, float32
or float64, usually a view into such a buffer) gets its gradient *added* there in the backward pass, without a
temporary, and autograd gets none for it: `param.grad` stays None.  A parameter without it is treated as usual.

Shapes: N rows (any leading dims), D inputs, F outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, over the last dimension of `x_ND`."""
    return _Linear.apply(x_ND, weight_FD, bias_F)


def linears(x_ND: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`linear` of the same input with several weights, as one autograd node: their gradients with respect to it are summed by
    the GEMMs themselves."""
    return _Linears.apply(x_ND, len(weights), *weights, *biases)


def main_grad(parameter: Tensor | None) -> Tensor | None:
    """The buffer that the gradient of `parameter` is added to, None if it has none."""
    return getattr(parameter, "main_grad", None)


def add_outer(grad_FD: Tensor, dy_NF: Tensor, x_ND: Tensor) -> None:
    """grad += dy.T @ x, by the GEMM itself where the types allow it."""
    if grad_FD.dtype == dy_NF.dtype:
        grad_FD.addmm_(dy_NF.t(), x_ND)
    else:
        grad_FD.add_(torch.mm(dy_NF.t(), x_ND))


def add_rows(grad_F: Tensor, dy_NF: Tensor) -> None:
    """grad += the sum of the rows, summed in the precision of `grad_F`."""
    grad_F.add_(dy_NF.sum(0, dtype=grad_F.dtype))


def _outputs(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return torch.mm(x_ND, weight_FD.t()) if bias_F is None else torch.addmm(bias_F, x_ND, weight_FD.t())


def _weight_gradient(needed: bool, main: Tensor | None, dy_NF: Tensor, x_ND: Tensor) -> Tensor | None:
    """For autograd, or None if it was added to `main`."""
    if needed and main is None:
        return torch.mm(dy_NF.t(), x_ND)
    if needed and main is not None:
        add_outer(main, dy_NF, x_ND)
    return None


def _bias_gradient(needed: bool, main: Tensor | None, dy_NF: Tensor) -> Tensor | None:
    if needed and main is None:
        return dy_NF.sum(0)
    if needed and main is not None:
        add_rows(main, dy_NF)
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        ctx.weight_grad, ctx.bias_grad = main_grad(weight_FD), main_grad(bias_F)
        y_NF = _outputs(x.reshape(-1, x.shape[-1]), weight_FD, bias_F)
        return y_NF.view(*x.shape[:-1], weight_FD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_FD = ctx.saved_tensors
        x_ND, dy_NF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.mm(dy_NF, weight_FD).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight_FD = _weight_gradient(ctx.needs_input_grad[1], ctx.weight_grad, dy_NF, x_ND)
        return dx, dweight_FD, _bias_gradient(ctx.needs_input_grad[2], ctx.bias_grad, dy_NF)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int, *weights_and_biases: Any) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[:number], weights_and_biases[number:]
        ctx.save_for_backward(x, *weights)
        ctx.main = [main_grad(parameter) for parameter in weights_and_biases]
        x_ND = x.reshape(-1, x.shape[-1])
        return tuple(_outputs(x_ND, w, b).view(*x.shape[:-1], w.shape[0]) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        number, needed = len(weights), ctx.needs_input_grad[2:]
        x_ND, dy_NFs = x.reshape(-1, x.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx = None
        if ctx.needs_input_grad[0]:
            dx_ND = torch.mm(dy_NFs[0], weights[0])
            for dy_NF, weight_FD in zip(dy_NFs[1:], weights[1:], strict=True):
                dx_ND.addmm_(dy_NF, weight_FD)
            dx = dx_ND.view(x.shape)
        dweights = [_weight_gradient(needed[i], ctx.main[i], dy_NF, x_ND) for i, dy_NF in enumerate(dy_NFs)]
        dbiases = [_bias_gradient(needed[number + i], ctx.main[number + i], dy_NF) for i, dy_NF in enumerate(dy_NFs)]
        return dx, None, *dweights, *dbiases
