"""The gradient of an auxiliary loss is divided by the number of data-parallel ranks as well.

The main loss is multiplied by that number, as the average over the ranks divides by it.  An auxiliary loss that a function lets
in at backward is not: its coefficient shrinks with the number of ranks, and experts are balanced worse.

Reported as https://github.com/NVIDIA-NeMo/Automodel/pull/1412
The same in this project, of all losses: python tools/verify_layouts.py model=tiny --ranks 4 --plant divided_by_dp_twice
and of an auxiliary one alone: python tools/verify_layouts.py model=tiny --ranks 4 --plant mtp_loss_divided_twice
"""

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, router, values = torch.randn(32, 8), torch.randn(8, 4), torch.randn(4, 8)


class WithLoss(torch.autograd.Function):
    """Passes weights on; backward adds the gradient of a loss, times `scale`."""

    scale = 1.0

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.tensor(WithLoss.scale)


def gradient(ranks: int, scale: float, coefficient: float) -> Tensor:
    """Of the router, averaged over the ranks."""
    WithLoss.scale = scale
    found = []
    for own in x.chunk(ranks):
        w = router.clone().requires_grad_()
        z_loss = coefficient * (own @ w).logsumexp(1).square().sum() / len(x)
        (ranks * (WithLoss.apply((own @ w).softmax(1), z_loss) @ values).square().sum() / len(x)).backward()
        found.append(w.grad)
    return torch.stack(found).mean(0)


def of_auxiliary_loss(ranks: int, scale: float) -> Tensor:
    return gradient(ranks, scale, 1.0) - gradient(ranks, scale, 0.0)


one = of_auxiliary_loss(1, 1.0)
print(f"{'one process':22} gradient of the router by the z-loss: norm {one.norm():.4f}")
for ranks in (2, 4):
    right, wrong = of_auxiliary_loss(ranks, float(ranks)), of_auxiliary_loss(ranks, 1.0)
    print(f"{f'{ranks} ranks':22} gradient of the router by the z-loss: norm {right.norm():.4f}")
    print(f"{f'with the bug, {ranks} ranks':22} the same: norm {wrong.norm():.4f}, {wrong.norm() / one.norm():.2f} times")
    assert_close(right, one)
    assert_close(wrong, one / ranks)
print("how to see it in your framework: print the router's gradient by the auxiliary loss on 1, 2, 4 ranks; all must be equal.")
