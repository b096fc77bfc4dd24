"""With pipelines, gradients are off by a number of tokens or micro-batches.

Losses are sums over tokens, divided by the tokens of all micro-batches; nothing is left to divide.  The schedule of a pipeline
takes each for the mean of its micro-batch, and divides gradients by their number at the end.

Reported as https://github.com/pytorch/torchtitan/issues/2972
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant divided_by_micro_batches
"""

import torch
from torch import Tensor, nn
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(24, 8)
first, second = nn.Linear(8, 8), nn.Linear(8, 8)  # a stage each
parameters = [*first.parameters(), *second.parameters()]


def one_process() -> list[Tensor]:
    loss = second(first(x).tanh()).square().sum() / len(x)
    return list(torch.autograd.grad(loss, parameters))


def pipeline(micro_batches: int, schedule_divides: bool) -> list[Tensor]:
    """Two stages; what passes between them is a message, and so is its gradient."""
    for p in parameters:
        p.grad = None
    for tokens in x.chunk(micro_batches):
        sent = first(tokens).tanh()
        got = sent.detach().requires_grad_()
        (second(got).square().sum() / len(x)).backward()
        sent.backward(got.grad)
    return [p.grad / (micro_batches if schedule_divides else 1) for p in parameters]


one = one_process()
print(f"{'one process, pp=1':36} gradient of the first layer: norm {one[0].norm():.4f}")
for micro_batches in (2, 4):
    right, wrong = pipeline(micro_batches, False), pipeline(micro_batches, True)
    what = f"pp=2, {micro_batches} micro-batches"
    print(f"{what:36} gradient of the first layer: norm {right[0].norm():.4f}")
    print(f"{'with the bug, ' + what:36} the same: norm {wrong[0].norm():.4f}, {wrong[0].norm() / one[0].norm():.2f} times")
    assert_close(right, one)
    assert not torch.allclose(wrong[0], one[0])
print(
    "how to see it in your framework: print the gradient of every parameter with pp=1 and with pp=2, for two numbers of "
    "micro-batches; all must be equal."
)
