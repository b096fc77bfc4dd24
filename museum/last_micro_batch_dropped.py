"""Only some micro-batches reach the gradient.

A layer adds its weight's gradient to the buffer itself, and sets a flag so that nobody adds it again.  The flag is cleared once a
step, but asked for by each micro-batch: the first one's gradient is all there is.  In another framework a buffer was emptied by
each micro-batch, and only the last one was left.

Reported as https://github.com/AMD-AGI/Primus/pull/1046 and https://github.com/NVIDIA/Megatron-LM/pull/7186
The same in this project, without the last: python tools/verify_layouts.py model=tiny --ranks 4 --plant last_micro_batch_dropped
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


class Parameter:
    def __init__(self, asks_flag: bool):
        self.main_grad = torch.zeros_like(weight)
        self.added_to_main_grad = False  # cleared here, at the begin of a step
        self.asks_flag = asks_flag

    def add(self, gradient: Tensor) -> None:
        if not (self.asks_flag and self.added_to_main_grad):
            self.main_grad += gradient
        self.added_to_main_grad = True


def step(ranks: int, micro_batches: int, asks_flag: bool = False) -> Tensor:
    parameters = [Parameter(asks_flag) for _ in range(ranks)]
    for tokens in x.chunk(micro_batches):
        for parameter, own in zip(parameters, tokens.chunk(ranks)):
            parameter.add(backward(own))
    return sum(p.main_grad for p in parameters)  # an all-reduce


one = backward(x)
print(f"{'one process, the whole batch':40} gradient: norm {one.norm():.4f}")
for micro_batches in (1, 2):
    right, wrong = step(2, micro_batches), step(2, micro_batches, asks_flag=True)
    print(f"{f'2 ranks, micro-batches: {micro_batches}':40} gradient: norm {right.norm():.4f}")
    print(f"{f'with the bug, 2 ranks, micro-batches: {micro_batches}':40} gradient: norm {wrong.norm():.4f}")
    assert_close(right, one)
    assert torch.allclose(wrong, one) == (micro_batches == 1)
print("how to see it in your framework: print the gradient of a batch as one micro-batch and as two; both must be equal.")
