"""Muon: momentum that Newton-Schulz makes orthogonal, matrix by matrix; AdamW for all other parameters.

Jordan et al. 2024 ("Muon", kellerjordan.github.io/posts/muon); scales: Moonlight (Liu et al. 2025, arXiv:2502.16982).
N matrices of R rows and C columns, short and long the smaller and the larger of both.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megalina.train.optim import AdamW, MatrixRule

SMALLEST_NORM = 1e-7  # of what is divided by its norm: nothing stays nothing
AT_ONCE = 2**24  # elements: of more matrices than make up so many, some wait


class Muon(AdamW, MatrixRule):
    description = "Muon: Newton-Schulz; the rest AdamW: torch, fused kernel"

    def pursued(self, gradient_NRC: Tensor, state: Mapping[str, Tensor], scale: float) -> Tensor:
        momentum_NRC = (state["momentum"] * self.config.muon_momentum).add_(gradient_NRC, alpha=scale)
        if not self.config.muon_nesterov:
            return momentum_NRC
        return momentum_NRC.mul_(self.config.muon_momentum).add_(gradient_NRC, alpha=scale)

    def direction(self, pursued_NRC: Tensor) -> Tensor:
        config, (_, rows, columns) = self.config, pursued_NRC.shape
        coefficients = (config.muon_a, config.muon_b, config.muon_c)
        dtype = torch.bfloat16 if config.muon_dtype == "bfloat16" else pursued_NRC.dtype
        some = max(1, AT_ONCE // (rows * columns))
        out_NRC = torch.empty_like(pursued_NRC)
        for part, out in zip(pursued_NRC.split(some), out_NRC.split(some), strict=True):
            out.copy_(orthogonal(part.to(dtype), config.muon_steps, coefficients))
        return out_NRC.mul_(scale_of(config.muon_scale, rows, columns))

    def apply(
        self,
        weight_NRC: Tensor,
        gradient_NRC: Tensor,
        state: Mapping[str, Tensor],
        direction_NRC: Tensor,
        *,
        scale: float,
        lr: float,
        weight_decay: float,
    ) -> None:
        state["momentum"].mul_(self.config.muon_momentum).add_(gradient_NRC, alpha=scale)
        weight_NRC.mul_(1 - lr * weight_decay).add_(direction_NRC, alpha=-lr)


def orthogonal(x_NRC: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """[N, R, C]: nearly U V' of each matrix U S V', by an odd polynomial in it that pushes all singular values towards 1, `steps`
    times: X becomes a X + (b A + c A A) X with A = X X'.  Singular values begin below 1, as the norm of all of them is 1."""
    a, b, c = coefficients
    x = x_NRC if x_NRC.shape[1] <= x_NRC.shape[2] else x_NRC.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=SMALLEST_NORM).view(-1, 1, 1)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if x_NRC.shape[1] <= x_NRC.shape[2] else x.mT


def scale_of(rule: str, rows: int, columns: int) -> float:
    """What multiplies a direction of a whole matrix, by `optim.muon_scale`.

    `match_rms_adamw`: so that elements change by about as much as AdamW's, 0.2 times the learning rate (Moonlight, section 2.2);
    `original`: Jordan's; `spectral`: without the 0.2; ValueError for another."""
    match rule:
        case "match_rms_adamw":
            return 0.2 * max(rows, columns) ** 0.5
        case "original":
            return max(1.0, rows / columns) ** 0.5
        case "spectral":
            return max(rows, columns) ** 0.5
        case "none":
            return 1.0
    raise ValueError(f"optim.muon_scale is {rule!r}: choose match_rms_adamw, original, spectral or none")
