"""The rotary position embedding (Su et al. 2021), halves rotated as Hugging Face does, so that its weights can be copied.

Longer contexts as in transformers' modeling_rope_utils.py, in float64: `linear` (positions divided by a factor) and `yarn` (Peng
et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4).

Shapes: B sequences, S tokens, H heads (of queries or keys), d numbers a head, i pairs of them that turn (all d/2, or fewer),
P positions of the table.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalina.batch import Batch
from megalina.config import ModelConfig


class Rotary(nn.Module):
    """The table of RoPE, shared by all layers; cast to the type of the queries."""

    cos_Pi: Tensor
    sin_Pi: Tensor

    def __init__(self, cos_Pi: Tensor, sin_Pi: Tensor):
        super().__init__()
        self.register_buffer("cos_Pi", cos_Pi, persistent=False)
        self.register_buffer("sin_Pi", sin_Pi, persistent=False)

    def rows(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin at each position, [B, S, i]."""
        return self.cos_Pi[batch.position_BS].to(dtype), self.sin_Pi[batch.position_BS].to(dtype)


def rope_table(max_positions: int, frequency_i: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin times `factor`, [P, i] each, float64: pair i of position p turns by p * frequency.  Cast to the model's dtype
    at use."""
    angle = torch.arange(max_positions, dtype=torch.float64, device=frequency_i.device)[:, None] * frequency_i
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def frequencies(model: ModelConfig, width: int, device: torch.device | None = None) -> Tensor:
    """float64 [i]: radians a position, of each pair of the `width` numbers that turn.  ValueError for an odd width."""
    if width % 2:
        raise ValueError(f"RoPE turns pairs: the numbers of a head that turn must be even, got {width}")
    theta, factor = model.rope_theta, model.rope_factor
    plain_i = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    if model.rope_scaling == "none":
        return plain_i
    if model.rope_scaling == "linear":
        return plain_i / factor
    low, high = _yarn_bounds(model, width)
    number_i = torch.arange(width // 2, dtype=torch.float64, device=device)
    slowed_i = ((number_i - low) / (high - low)).clamp(0, 1)  # 0: as it was; 1: by the whole factor
    return plain_i / factor * slowed_i + plain_i * (1 - slowed_i)


def _yarn_bounds(model: ModelConfig, width: int) -> tuple[float, float]:
    """Pairs up to the first stay as they are, those from the second on are slowed by the whole factor (YaRN, definition 2)."""

    def pair(turns: float) -> float:
        """The pair that turns so often in the original context."""
        length = model.rope_original_positions
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))

    low, high = pair(model.rope_beta_fast), pair(model.rope_beta_slow)
    if model.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high + 0.001 if low == high else high


def attention_factor(model: ModelConfig) -> float:
    """What cosines and sines are multiplied by, so that scores are by its square (YaRN, equation 22)."""
    if model.rope_scaling != "yarn":
        return 1.0
    if model.rope_attention_factor:
        return model.rope_attention_factor
    if model.rope_mscale and model.rope_mscale_all_dim:
        return _mscale(model, model.rope_mscale) / _mscale(model, model.rope_mscale_all_dim)
    return _mscale(model, 1.0)


def score_factor(model: ModelConfig) -> float:
    """What DeepSeek multiplies all of a score by besides."""
    return _mscale(model, model.rope_mscale_all_dim) ** 2 if model.rope_mscale_all_dim else 1.0


def _mscale(model: ModelConfig, weight: float) -> float:
    return 0.1 * weight * math.log(model.rope_factor) + 1.0 if model.rope_factor > 1 else 1.0


def rotate(x_BSHd: Tensor, cos_BSi: Tensor, sin_BSi: Tensor, first: int = 0) -> Tensor:
    """Turn each head's pairs (first + j, first + j + i) by the angle of its token; cos and sin are table rows, [B, S, i].  What
    is not among these 2 x i numbers stays."""
    return _Rotate.apply(x_BSHd, cos_BSi, sin_BSi, first)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHd: Tensor, cos_BSi: Tensor, sin_BSi: Tensor, first: int) -> Tensor:
        ctx.save_for_backward(cos_BSi, sin_BSi)
        ctx.first = first
        return _turn(x_BSHd, cos_BSi, sin_BSi, first, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSHd: Tensor) -> tuple[Tensor, None, None, None]:
        cos_BSi, sin_BSi = ctx.saved_tensors
        return _turn(dy_BSHd, cos_BSi, sin_BSi, ctx.first, -1), None, None, None


def _turn(x_BSHd: Tensor, cos_BSi: Tensor, sin_BSi: Tensor, first: int, sign: int) -> Tensor:
    cos, sin = cos_BSi.unsqueeze(2), sin_BSi.unsqueeze(2)
    out_BSHd = torch.empty(x_BSHd.shape, dtype=x_BSHd.dtype, device=x_BSHd.device)
    last = first + 2 * cos.shape[-1]
    for stays in (slice(0, first), slice(last, x_BSHd.shape[-1])):
        if stays.start < stays.stop:
            out_BSHd[..., stays] = x_BSHd[..., stays]
    x1, x2 = x_BSHd[..., first:last].chunk(2, dim=-1)
    y1, y2 = out_BSHd[..., first:last].chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1)
    y1.addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2)
    y2.addcmul_(x1, sin, value=sign)
    return out_BSHd
