"""A bucket of gradients is sent off before the last micro-batch has added to it.

To overlap communication with backward, a bucket is reduced as soon as all its gradients are there.  They are there after the
first micro-batch, too.  What later ones add stays on its rank, and ranks with copies of a weight move it differently.

Reported as https://github.com/InfiniTensor/InfiniTrain/pull/213 and https://github.com/NVIDIA/Megatron-LM/issues/1012
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant bucket_reduced_early
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
TOKENS, RANKS, MICRO_BATCHES = 24, 2, 2
x, weight = torch.randn(TOKENS, 8), torch.randn(8, 8)


def backward(tokens: Tensor) -> Tensor:
    w = weight.clone().requires_grad_()
    ((tokens @ w).tanh().square().sum() / TOKENS).backward()
    return w.grad


def buckets(reduced_behind: int) -> list[Tensor]:
    """Each rank's bucket at the end of a step, if it is reduced behind this micro-batch."""
    held = [torch.zeros_like(weight) for _ in range(RANKS)]
    for micro_batch, tokens in enumerate(x.chunk(MICRO_BATCHES)):
        for bucket, own in zip(held, tokens.chunk(RANKS)):
            bucket += backward(own)
        if micro_batch == reduced_behind:
            summed = sum(held)
            held = [summed.clone() for _ in held]
    return held


one, right, wrong = backward(x), buckets(MICRO_BATCHES - 1), buckets(0)
print(f"{'one process':22} gradient: norm {one.norm():.4f}")
for who, found in (("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    print(f"{who:22} gradient on each rank: norms {', '.join(f'{g.norm():.4f}' for g in found)}")
for gradient in right:
    assert_close(gradient, one)
assert not torch.allclose(*wrong)
assert not torch.allclose(wrong[0], one)
print(
    "how to see it in your framework: print a gradient on each data-parallel rank before the optimizer's step, with two "
    "micro-batches; they must be equal, and equal to that of one process."
)
