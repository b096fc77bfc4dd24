"""With sequence parallelism the norms' gradients are not summed over the tensor-parallel ranks.

Every rank has all weights of a layer norm, and with sequence parallelism a part of the tokens.  Its gradient is that of these
tokens: it has to be summed over the tensor-parallel group, where nothing else is summed at the end of a step.

Reported as https://github.com/NVIDIA/Megatron-LM/issues/1446 and https://github.com/EleutherAI/gpt-neox/pull/1257
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant sequence_norm_not_summed
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
TP = 2
x, matrix, norm_weight = torch.randn(16, 8), torch.randn(8, 8), torch.rand(8)


def norm_gradient(tokens: Tensor) -> Tensor:
    """Of the tokens that a rank has."""
    w = norm_weight.clone().requires_grad_()
    out = rms_norm(tokens, (8,), w) @ matrix
    (out.square().sum() / len(x)).backward()
    return w.grad


def on_ranks(summed: bool) -> list[Tensor]:
    """What each rank's optimizer gets."""
    own = [norm_gradient(tokens) for tokens in x.chunk(TP)]
    return [sum(own) for _ in own] if summed else own


one = norm_gradient(x)
right, wrong = on_ranks(summed=True), on_ranks(summed=False)
print(f"{'one process':21} gradient of the norm: {one.norm():.4f}")
for who, found in (("tp=2", right), ("with the bug, tp=2", wrong)):
    print(f"{who:21} gradient of the norm on each rank: {', '.join(f'{g.norm():.4f}' for g in found)}")
for gradient in right:
    assert_close(gradient, one)
assert not torch.allclose(*wrong)
print(
    "how to see it in your framework: print the gradient of a layer norm on each rank of a tensor-parallel group, with sequence "
    "parallelism; they must be equal, and equal to that of one process."
)
