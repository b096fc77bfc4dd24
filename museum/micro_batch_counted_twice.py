"""A micro-batch is added to what holds it already.

Gradients of a micro-batch are summed over ranks in a buffer of their own, and then added to the rank's shard, which holds those
of the micro-batches before.  A group of one rank has nothing to sum, and its buffer is the shard itself: what it holds is added
to it.  Of two micro-batches the first counts twice, of three four times, and so on; with one, all is well.

Reported as https://github.com/NVIDIA/Megatron-LM/issues/6660
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant micro_batch_counted_twice
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
TOKENS = 24
x, weight = torch.randn(TOKENS, 8), torch.randn(8, 8)


def backward(tokens: Tensor) -> Tensor:
    w = weight.clone().requires_grad_()
    ((tokens @ w).tanh().square().sum() / TOKENS).backward()
    return w.grad


def accumulated(ranks: int, micro_batches: int, buffer_is_shard: bool = False) -> Tensor:
    shard = torch.zeros_like(weight)  # of all ranks, one behind the other
    for tokens in x.chunk(micro_batches):
        buffer = shard.clone() if buffer_is_shard else torch.zeros_like(shard)
        for own in tokens.chunk(ranks):
            buffer += backward(own)  # a reduce-scatter
        shard += buffer
    return shard


one = backward(x)
print(f"{'one process, the whole batch':39} gradient: norm {one.norm():.4f}")
for micro_batches in (1, 2, 3):
    right = accumulated(2, micro_batches)
    wrong = accumulated(1, micro_batches, buffer_is_shard=True)
    print(f"{f'2 ranks, micro-batches: {micro_batches}':39} gradient: norm {right.norm():.4f}")
    print(f"{f'with the bug, 1 rank, micro-batches: {micro_batches}':39} gradient: norm {wrong.norm():.4f}")
    assert_close(right, one)
    assert torch.allclose(wrong, one) == (micro_batches == 1)
both = accumulated(1, 2, buffer_is_shard=True)
assert_close(both, one + backward(x.chunk(2)[0]))
print(
    "how to see it in your framework: print the gradient of a batch as one micro-batch and as two, also where a weight has one "
    "rank (experts with ep=dp); both must be equal."
)
