"""A gather without backward cuts the router off.

Each rank has an expert, and computes it for the tokens of all ranks: these are gathered, and so are their combine weights.  The
gather gives new tensors without a history.  The router still has a gradient, that of the balance loss, and balances for nothing.

Reported as https://github.com/NVIDIA-NeMo/Automodel/issues/2995
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant router_detached
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
EXPERTS = 2
x, router, experts = torch.randn(16, 8), torch.randn(8, EXPERTS), torch.randn(EXPERTS, 8, 8)
share = torch.bincount((x @ router).argmax(1), minlength=EXPERTS) / len(x)
Gather = Callable[[list[Tensor]], Tensor]


def all_gather(parts: list[Tensor]) -> Tensor:
    """Its backward gives each rank the sum of what all ranks' experts have for its tokens."""
    return torch.cat(parts)


def all_gather_without_backward(parts: list[Tensor]) -> Tensor:
    """As torch.distributed.all_gather does."""
    return torch.cat(parts).detach()


def router_gradient(ranks: int, gather: Gather, main: float = 1.0) -> Tensor:
    w = router.clone().requires_grad_()
    weights = [(own @ w).softmax(1) for own in x.chunk(ranks)]
    of_all = gather(weights)
    outputs = [of_all[:, e : e + 1] * (x @ experts[e]) for e in range(EXPERTS)]  # each by the rank that has the expert
    loss = main * sum(outputs).square().sum() / len(x)  # the sum over ranks is a reduce-scatter
    loss += EXPERTS * sum((share * own).sum() for own in weights) / len(x)
    loss.backward()
    return w.grad


one = router_gradient(1, all_gather)
balance_alone = router_gradient(1, all_gather, main=0.0)
right, wrong = router_gradient(2, all_gather), router_gradient(2, all_gather_without_backward)
print(f"one process             gradient of the router: norm {one.norm():.4f}; the balance loss alone {balance_alone.norm():.4f}")
print(f"2 ranks                 gradient of the router: norm {right.norm():.4f}")
print(f"with the bug, 2 ranks   gradient of the router: norm {wrong.norm():.4f}")
assert_close(right, one)
assert_close(wrong, balance_alone)
assert not torch.allclose(wrong, one)
print(
    "how to see it in your framework: print the router's gradient with the balance loss's coefficient at 0, on one process and "
    "with expert parallelism; both must be equal, and neither be zero."
)
