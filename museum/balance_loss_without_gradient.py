"""The balance loss is logged, and has no gradient.

A function passes the router's weights on and lets the loss in at backward.  Its result is thrown away: the loss was computed and
is logged, it even falls and rises with the routing, but nothing that is differentiated depends on it.

Reported as https://github.com/NVIDIA-NeMo/Automodel/issues/1408
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant balance_loss_without_gradient
"""

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
EXPERTS = 4
x, router, worth = torch.randn(32, 8), torch.randn(8, EXPERTS), torch.randn(32)


class WithLoss(torch.autograd.Function):
    """Passes weights on; backward adds the gradient of a loss."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(())


def run(ranks: int, coefficient: float, keeps_result: bool = True) -> tuple[Tensor, float]:
    """The router's gradient, and the balance loss that is logged."""
    share = torch.bincount((x @ router).argmax(1), minlength=EXPERTS) / len(x)  # over all ranks' tokens
    w, logged = router.clone().requires_grad_(), 0.0
    for own, own_worth in zip(x.chunk(ranks), worth.chunk(ranks)):
        probability = (own @ w).softmax(1)
        loss = EXPERTS * (share * probability).sum() / len(x)
        logged += loss.item()
        weight = probability.amax(1)
        with_loss = WithLoss.apply(weight, coefficient * loss)
        ((with_loss if keeps_result else weight) * own_worth).sum().backward()
    return w.grad, logged


for who, ranks, keeps in (("one process", 1, True), ("2 ranks", 2, True), ("with the bug, 2 ranks", 2, False)):
    (without, _), (with_loss, logged) = run(ranks, 0.0, keeps), run(ranks, 1.0, keeps)
    norms = f"{without.norm():.4f} and {with_loss.norm():.4f}"
    print(f"{who:22} balance loss {logged:.4f}; the router's gradient with it at 0 and at 1: norms {norms}")
    assert torch.equal(without, with_loss) == (not keeps)
assert_close(run(2, 1.0), run(1, 1.0))
print(
    "how to see it in your framework: print the router's gradient with the balance loss's coefficient at 0 and at 1; they must "
    "differ, and each be equal on one process and on two."
)
