"""Contributions of other ranks to an expert's gradient are missing.

Experts are marked, so that the reduction over all ranks leaves them out: other ranks have other experts.  Where there are more
ranks than an expert-parallel group has, several hold the same expert, and need a reduction of their own, which nobody wrote.

Reported as https://github.com/huggingface/transformers/pull/48205 and https://github.com/facebookresearch/fairseq/issues/4220
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant expert_gradient_not_reduced
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS, EP, TOKENS = 4, 2, 32  # as many experts as ranks in a group; ranks 0 and 2 have the first, 1 and 3 the second
x, experts = torch.randn(TOKENS, 8), torch.randn(EP, 8, 8)
expert_of = torch.randint(EP, (TOKENS,))


def backward(expert: int, tokens: slice) -> Tensor:
    """An expert's gradient by those of these tokens that chose it."""
    w = experts[expert].clone().requires_grad_()
    chosen = x[tokens][expert_of[tokens] == expert]
    ((chosen @ w).tanh().square().sum() / TOKENS).backward()
    return w.grad


def on_ranks(reduced: bool) -> list[Tensor]:
    """The gradient of the expert that a rank has, rank by rank."""
    of_group = TOKENS // RANKS * EP  # the tokens of a group, exchanged between its ranks
    groups = [slice(first, first + of_group) for first in range(0, TOKENS, of_group)]
    own = [backward(rank % EP, groups[rank // EP]) for rank in range(RANKS)]
    return [sum(own[rank % EP :: EP]) for rank in range(RANKS)] if reduced else own


one = [backward(expert, slice(0, TOKENS)) for expert in range(EP)]
right, wrong = on_ranks(reduced=True), on_ranks(reduced=False)
print(f"{'one process':28} gradient of expert 0: norm {one[0].norm():.4f}")
for who, found in (("4 ranks, ep=2", right), ("with the bug, 4 ranks, ep=2", wrong)):
    print(f"{who:28} gradient of expert 0 on the ranks that have it: norms {', '.join(f'{g.norm():.4f}' for g in found[::EP])}")
for rank, gradient in enumerate(right):
    assert_close(gradient, one[rank % EP])
assert not torch.allclose(wrong[0], wrong[2])
assert_close(wrong[0] + wrong[2], one[0])
print(
    "how to see it in your framework: print an expert's gradient on each rank that holds it; they must be equal, and equal to "
    "that of one process."
)
