"""Experts' gradients are too large by the number of ranks that share the experts.

With expert parallelism (ep) an expert gets the tokens of all ranks of its group, so that its gradient is a sum over them before
anything is reduced.  The average that follows is over the ranks with a copy of the expert, and divides by their number alone.
Adam hides the factor, until the norm of the gradients or another layout is looked at.

Reported as https://github.com/NVIDIA/Megatron-LM/pull/7160, https://github.com/deepspeedai/DeepSpeed/pull/5259 and
https://github.com/pytorch/pytorch/issues/160285
The same in this project, by the number of copies: experts' gradients are summed where they should be averaged:
python tools/verify_layouts.py model=tiny --ranks 4 --plant experts_scaled_by_edp
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS, EXPERTS, TOKENS, WIDTH = 4, 4, 64, 8
x = torch.randn(TOKENS, WIDTH)
expert_of = torch.randint(EXPERTS, (TOKENS,))
weights = torch.randn(EXPERTS, WIDTH, WIDTH)


def backward(tokens: slice, divisor: int) -> Tensor:
    """The experts' gradients for the sum of these tokens' losses, divided."""
    w = weights.clone().requires_grad_()
    out = torch.einsum("td,tdo->to", x[tokens], w[expert_of[tokens]])
    (out.square().sum() / divisor).backward()
    return w.grad


def reduced(ep: int, divisor: int) -> Tensor:
    """Summed over the groups of ep ranks: each has all experts, and the tokens of ep ranks, which take the mean of their own."""
    own = TOKENS // RANKS
    groups = [slice(first * own, (first + ep) * own) for first in range(0, RANKS, ep)]
    return sum(backward(tokens, own) for tokens in groups) / divisor


one = backward(slice(0, TOKENS), TOKENS)
print(f"{'one process':26} gradient of expert 0: norm {one[0].norm():.4f}")
for ep in (1, 2, 4):
    right, wrong = reduced(ep, RANKS), reduced(ep, RANKS // ep)
    times = wrong[0].norm() / one[0].norm()
    print(f"{f'4 ranks, ep={ep}':26} gradient of expert 0: norm {right[0].norm():.4f}")
    print(f"{f'with the bug, ep={ep}':26} gradient of expert 0: norm {wrong[0].norm():.4f}, {times:.2f} times as large")
    assert_close(right, one)
    assert_close(wrong, ep * one)
print(
    "how to see it in your framework: print the gradient of one expert behind the reduction, for the same batch, without and "
    "with expert parallelism; both must be equal."
)
