"""The norm: RMSNorm (Zhang and Sennrich 2019) and LayerNorm over the last dimension, statistics in at least float32.

Backward saves the input and one or two numbers a row.  Gradients of parameters with `main_grad` are added there, see linear.py.
Shapes: N rows (any leading dims), D width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalina.model.linear import main_grad


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where there is a bias."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return _RmsNorm.apply(x_ND, weight_D, eps)


def layer_norm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""
    return _LayerNorm.apply(x_ND, weight_D, bias_D, eps)


def rms_norm_by(x_ND: Tensor, square_N: Tensor, width: int, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` of rows of which D of `width` numbers are here; `square_N`: the sum of squares of all of them."""
    return _RmsNormBy.apply(x_ND, square_N, width, weight_D, eps)


def row_squares(x_ND: Tensor) -> Tensor:
    """The sum of squares of each row, [N], in at least float32."""
    wide_ND = _at_least_float32(x_ND)
    return torch.linalg.vecdot(wide_ND, wide_ND)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _deliver(buffer: Tensor | None, grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Add to the main gradient if there is one, else give autograd the gradient."""
    if buffer is None:
        return grad.to(dtype)
    buffer.add_(grad)
    return None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = _at_least_float32(x.reshape(-1, x.shape[-1]))
        rstd_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd_N1, weight_D)
        ctx.weight_grad = main_grad(weight_D)
        return (x_ND * rstd_N1).mul_(weight_D).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, rstd_N1, weight_D = ctx.saved_tensors
        width = x.shape[-1]
        xhat_ND = _at_least_float32(x.reshape(-1, width)) * rstd_N1
        dy_ND = _at_least_float32(dy.reshape(-1, width))
        product_ND = dy_ND * xhat_ND
        dx = dweight_D = None
        if ctx.needs_input_grad[1]:
            dweight_D = _deliver(ctx.weight_grad, product_ND.sum(0), weight_D.dtype)
        if ctx.needs_input_grad[0]:
            # d xhat = dy * weight; dx = rstd * (d xhat - xhat * mean(d xhat * xhat))
            mean_N1 = torch.mv(product_ND, _at_least_float32(weight_D)).div_(width).unsqueeze(1)
            dx_ND = torch.mul(dy_ND, weight_D, out=product_ND).addcmul_(xhat_ND, mean_N1, value=-1).mul_(rstd_N1)
            dx = dx_ND.to(x.dtype).view(x.shape)
        return dx, dweight_D, None


class _RmsNormBy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, square_N: Tensor, width: int, weight_D: Tensor, eps: float) -> Tensor:
        rstd_N1 = square_N.unsqueeze(1).div(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, rstd_N1, weight_D)
        ctx.weight_grad, ctx.width = main_grad(weight_D), width
        return (_at_least_float32(x_ND) * rstd_N1).mul_(weight_D).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, rstd_N1, weight_D = ctx.saved_tensors
        wide_ND = _at_least_float32(dy_ND)
        product_ND = _at_least_float32(x_ND) * rstd_N1 * wide_ND
        dweight_D = _deliver(ctx.weight_grad, product_ND.sum(0), weight_D.dtype) if ctx.needs_input_grad[3] else None
        # d rstd / d square = -rstd^3 / (2 width)
        dsquare_N = torch.mv(product_ND, _at_least_float32(weight_D)).div_(-2 * ctx.width).mul_(rstd_N1.squeeze(1).square())
        dx_ND = torch.mul(wide_ND, weight_D, out=product_ND).mul_(rstd_N1).to(x_ND.dtype)
        return dx_ND, dsquare_N, None, dweight_D, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        y, mean, rstd = torch.ops.aten.native_layer_norm.default(x, [x.shape[-1]], weight_D, bias_D, eps)
        ctx.save_for_backward(x, mean, rstd, weight_D, bias_D)
        ctx.weight_grad, ctx.bias_grad = main_grad(weight_D), main_grad(bias_D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, mean, rstd, weight_D, bias_D = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        dx, dweight_D, dbias_D = torch.ops.aten.native_layer_norm_backward.default(
            dy.contiguous(), x, [x.shape[-1]], mean, rstd, weight_D, bias_D, needed
        )
        if needed[1]:
            dweight_D = _deliver(ctx.weight_grad, dweight_D, weight_D.dtype)
        if needed[2]:
            dbias_D = _deliver(ctx.bias_grad, dbias_D, bias_D.dtype)
        return dx, dweight_D, dbias_D, None
