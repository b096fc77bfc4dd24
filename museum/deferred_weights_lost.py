"""Gradients of weights are put off for a zero-bubble schedule, and nobody computes them.

Backward of a linear layer gives the gradient of its input at once, and puts what its weight's gradient needs into a store, for
the schedule to come back to.  Other schedules don't know of the store: the weight keeps a gradient of zero, and never moves.

Reported as https://github.com/deepspeedai/Megatron-DeepSpeed/issues/442
The same in this project:
python tools/verify_layouts.py model=tiny strategy.deferred_weights=all --ranks 4 --plant deferred_weights_lost
"""

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, first, second = torch.randn(12, 8), torch.randn(8, 8), torch.randn(8, 8)
store: list[tuple[Tensor, Tensor, Tensor]] = []  # of weights, what is left to do


class Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, weight = ctx.saved_tensors
        store.append((weight, rows.detach(), gradient))
        return gradient @ weight.T, None


def step(micro_batches: int, deferred: bool, schedule_comes_back: bool = False) -> list[Tensor]:
    """Gradients of both layers' weights, of which the second is deferred."""
    weights = [w.clone().requires_grad_() for w in (first, second)]
    for w in weights:
        w.grad = torch.zeros_like(w)
    for tokens in x.chunk(micro_batches):
        rows = (tokens @ weights[0]).tanh()
        out = Deferred.apply(rows, weights[1]) if deferred else rows @ weights[1]
        (out.square().sum() / len(x)).backward()
    for weight, rows, gradient in store if schedule_comes_back else []:
        weight.grad += rows.T @ gradient
    store.clear()
    return [w.grad for w in weights]


one, right, wrong = step(1, False), step(2, True, schedule_comes_back=True), step(2, True)
for who, found in (("one process", one), ("zero bubble", right), ("with the bug", wrong)):
    print(f"{who:13} gradients of two linear layers: norms {found[0].norm():.4f} and {found[1].norm():.4f}")
assert_close(right, one)
assert_close(wrong[0], one[0])
assert not wrong[1].any()
print("how to see it in your framework: print each linear layer's gradient with your schedule and pp=1; they must be equal.")
