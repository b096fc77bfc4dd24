"""The linear layer whose weight gradient is added in place by its own GEMM.

Gradients of a step live in flat buffers.  A parameter with an attribute `main_grad` (a tensor of its shape, float32
or float64, usually a view into such a buffer) gets its gradient *added* there in the backward pass, without a
temporary, and autograd gets none for it: `param.grad` stays None.  A parameter without it is treated as usual.

Shapes: N rows (any leading dims), D inputs, F outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, over the last dimension of `x_ND`."""
    return _Linear.apply(x_ND, weight_FD, bias_F)


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        ctx.weight_grad, ctx.bias_grad = main_grad(weight_FD), main_grad(bias_F)
        x_ND = x.reshape(-1, x.shape[-1])
        y_NF = torch.mm(x_ND, weight_FD.t()) if bias_F is None else torch.addmm(bias_F, x_ND, weight_FD.t())
        return y_NF.view(*x.shape[:-1], weight_FD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_FD = ctx.saved_tensors
        x_ND, dy_NF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = dweight_FD = dbias_F = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy_NF, weight_FD).view(x.shape)
        if ctx.needs_input_grad[1]:
            if ctx.weight_grad is None:
                dweight_FD = torch.mm(dy_NF.t(), x_ND)
            else:
                add_outer(ctx.weight_grad, dy_NF, x_ND)
        if ctx.needs_input_grad[2]:
            if ctx.bias_grad is None:
                dbias_F = dy_NF.sum(0)
            else:
                add_rows(ctx.bias_grad, dy_NF)
        return dx, dweight_FD, dbias_F
