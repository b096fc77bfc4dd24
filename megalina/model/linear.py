"""The linear layer whose weight gradient is added in place by its own GEMM.

Gradients of a step live in flat buffers.  A parameter with an attribute `main_grad` (a tensor of its shape, float32
or float64, usually a view into such a buffer) gets its gradient *added* there in the backward pass, without a
temporary, and autograd gets none for it: `param.grad` stays None.  A parameter without it is treated as usual.

Shapes: N rows (any leading dims), D inputs, F outputs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.model.late_gradients import LateGradient, Later


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, *, later: Later | None = None) -> Tensor:
    """x @ weight.T + bias, over the last dimension of `x_ND`.

    `later`: the backward pass puts there what adds the gradients of weight and bias, and leaves them out itself; they need
    `main_grad`."""
    return _Linear.apply(x_ND, weight_FD, bias_F, later)


def linears(
    x_ND: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, later: Later | None = None
) -> tuple[Tensor, ...]:
    """`linear` of the same input with several weights, as one autograd node: their gradients with respect to it are summed by
    the GEMMs themselves."""
    return _Linears.apply(x_ND, len(weights), later, *weights, *biases)


def wide_linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, *, later: Later | None = None) -> Tensor:
    """x @ weight.T + bias in float32, or wider where one of them is.  `later`: as in `linear`."""
    return _WideLinear.apply(x_ND, weight_FD, bias_F, later)


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


def _add(main_weight: Tensor | None, main_bias: Tensor | None, dy_NF: Tensor, x_ND: Tensor) -> None:
    """To the main gradients that there are."""
    if main_weight is not None:
        add_outer(main_weight, dy_NF, x_ND)
    if main_bias is not None:
        add_rows(main_bias, dy_NF)


def _gradients(
    needed: Sequence[bool], mains: Sequence[Tensor | None], dy_NF: Tensor, x_ND: Tensor, later: Later | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias: for autograd, or None where they are added to main gradients, now or `later`."""
    if later is None:
        return _weight_gradient(needed[0], mains[0], dy_NF, x_ND), _bias_gradient(needed[1], mains[1], dy_NF)
    assert all(main is not None for main, wanted in zip(mains, needed, strict=True) if wanted), "no main_grad, no later"
    own = [main if wanted else None for main, wanted in zip(mains, needed, strict=True)]
    later.append(LateGradient(partial(_add, own[0], own[1]), (dy_NF, x_ND)))
    return None, None


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
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, later: Later | None) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        ctx.main, ctx.later = (main_grad(weight_FD), main_grad(bias_F)), later
        y_NF = _outputs(x.reshape(-1, x.shape[-1]), weight_FD, bias_F)
        return y_NF.view(*x.shape[:-1], weight_FD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_FD = ctx.saved_tensors
        x_ND, dy_NF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.mm(dy_NF, weight_FD).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, *_gradients(ctx.needs_input_grad[1:3], ctx.main, dy_NF, x_ND, ctx.later), None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int, later: Later | None, *weights_and_biases: Any) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[:number], weights_and_biases[number:]
        ctx.save_for_backward(x, *weights)
        ctx.main, ctx.later = [main_grad(parameter) for parameter in weights_and_biases], later
        x_ND = x.reshape(-1, x.shape[-1])
        return tuple(_outputs(x_ND, w, b).view(*x.shape[:-1], w.shape[0]) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        number, needed = len(weights), ctx.needs_input_grad[3:]
        x_ND, dy_NFs = x.reshape(-1, x.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx = None
        if ctx.needs_input_grad[0]:
            dx_ND = torch.mm(dy_NFs[0], weights[0])
            for dy_NF, weight_FD in zip(dy_NFs[1:], weights[1:], strict=True):
                dx_ND.addmm_(dy_NF, weight_FD)
            dx = dx_ND.view(x.shape)
        pairs = [_gradients(needed[i::number], ctx.main[i::number], dy_NF, x_ND, ctx.later) for i, dy_NF in enumerate(dy_NFs)]
        return dx, None, None, *(weight for weight, _ in pairs), *(bias for _, bias in pairs)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None, later: Later | None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x_ND.dtype, weight_FD.dtype), torch.float32)
        wide_ND = x_ND.to(dtype)
        ctx.save_for_backward(wide_ND, weight_FD)
        ctx.main, ctx.later, ctx.x_dtype = (main_grad(weight_FD), main_grad(bias_F)), later, x_ND.dtype
        y_NF = torch.mm(wide_ND, weight_FD.to(dtype).t())
        return y_NF if bias_F is None else y_NF.add_(bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, ...]:
        wide_ND, weight_FD = ctx.saved_tensors
        dx_ND = torch.mm(dy_NF, weight_FD.to(dy_NF.dtype)).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        dweight_FD = dbias_F = None
        main_FD, main_F = ctx.main
        if ctx.needs_input_grad[1]:
            if main_FD is None:
                assert ctx.later is None, "no main_grad, no later"
                dweight_FD = torch.mm(dy_NF.t(), wide_ND).to(weight_FD.dtype)
            elif ctx.later is None:
                _add_narrowed(main_FD, main_F, dy_NF, wide_ND, weight_FD.dtype)
            else:
                add = partial(_add_narrowed, main_FD, main_F, dtype=weight_FD.dtype)
                ctx.later.append(LateGradient(add, (dy_NF, wide_ND)))
        if ctx.needs_input_grad[2] and main_F is None:
            dbias_F = dy_NF.sum(0).to(weight_FD.dtype)
        return dx_ND, dweight_FD, dbias_F, None


def _add_narrowed(main_FD: Tensor, main_F: Tensor | None, dy_NF: Tensor, wide_ND: Tensor, dtype: torch.dtype) -> None:
    """As autograd would, which casts the gradient to the weight's type first.  `main_F`: of the bias, if there is one."""
    main_FD.add_(torch.mm(dy_NF.t(), wide_ND).to(dtype))
    if main_F is not None:
        main_F.add_(dy_NF.sum(0).to(dtype))
