"""The rotary position embedding (Su et al. 2021), halves rotated as Hugging Face does, so that its weights can be copied.

Shapes: B sequences, S tokens, H heads (of queries or keys), d numbers a head, P positions of the table.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalina.batch import Batch


class Rotary(nn.Module):
    """The table of RoPE, shared by all layers; cast to the type of the queries."""

    cos_Pi: Tensor
    sin_Pi: Tensor

    def __init__(self, cos_Pi: Tensor, sin_Pi: Tensor):
        super().__init__()
        self.register_buffer("cos_Pi", cos_Pi, persistent=False)
        self.register_buffer("sin_Pi", sin_Pi, persistent=False)

    def rows(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin at each position, [B, S, d/2]."""
        return self.cos_Pi[batch.position_BS].to(dtype), self.sin_Pi[batch.position_BS].to(dtype)


def rope_table(max_positions: int, head_dim: int, theta: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, [P, d/2] each, float64: pair i of position p turns by p * theta^(-2i/d).  Cast to the model's dtype at use."""
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs: head_dim must be even, got {head_dim}")
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.arange(max_positions, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BSHd: Tensor, cos_BSi: Tensor, sin_BSi: Tensor) -> Tensor:
    """Turn each head's pairs (i, i + d/2) by the angle of its token; cos and sin are table rows, [B, S, d/2]."""
    return _Rotate.apply(x_BSHd, cos_BSi, sin_BSi)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHd: Tensor, cos_BSi: Tensor, sin_BSi: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BSi, sin_BSi)
        return _turn(x_BSHd, cos_BSi, sin_BSi, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSHd: Tensor) -> tuple[Tensor, None, None]:
        cos_BSi, sin_BSi = ctx.saved_tensors
        return _turn(dy_BSHd, cos_BSi, sin_BSi, -1), None, None


def _turn(x_BSHd: Tensor, cos_BSi: Tensor, sin_BSi: Tensor, sign: int) -> Tensor:
    cos, sin = cos_BSi.unsqueeze(2), sin_BSi.unsqueeze(2)
    out_BSHd = torch.empty(x_BSHd.shape, dtype=x_BSHd.dtype, device=x_BSHd.device)
    x1, x2 = x_BSHd.chunk(2, dim=-1)
    y1, y2 = out_BSHd.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1)
    y1.addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2)
    y2.addcmul_(x1, sin, value=sign)
    return out_BSHd
