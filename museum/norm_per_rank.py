"""Ranks clip by norms of their own.

A rank, or a stage of a pipeline, takes the norm of the gradients that it holds for that of all.  Each then scales by another
factor, and the weights of which several ranks have a copy drift apart.

Reported as https://github.com/NVIDIA-NeMo/Automodel/issues/3816 and https://github.com/pytorch/pytorch/issues/180346
The same in this project, of ranks: python tools/verify_layouts.py model=tiny --ranks 4 --plant norm_per_rank
and of stages: python tools/verify_layouts.py model=tiny --ranks 4 --plant norm_of_own_stage
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
CLIP = 1.0
dense = torch.randn(8, 8)  # each rank has a copy
experts = [torch.randn(8, 8), 3 * torch.randn(8, 8)]  # a rank has one of them


def norm_of_all() -> list[Tensor]:
    """What each rank finds: the squares of its expert are summed over the ranks, those of copies count once."""
    squares = dense.square().sum() + sum(e.square().sum() for e in experts)  # an all-reduce
    return [squares.sqrt() for _ in experts]


def norm_of_own() -> list[Tensor]:
    return [(dense.square().sum() + own.square().sum()).sqrt() for own in experts]


def clipped(norms: list[Tensor]) -> list[Tensor]:
    """The dense gradient as each rank's optimizer gets it."""
    return [dense * (CLIP / n).clamp(max=1.0) for n in norms]


one = torch.cat([dense.flatten(), *(e.flatten() for e in experts)]).norm()
right, wrong = norm_of_all(), norm_of_own()
print(f"{'one process':22} norm {one:.4f}, a dense gradient behind clipping {(dense / one)[0, 0]:.4f}")
for who, norms in (("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    found = ", ".join(f"{n:.4f}" for n in norms)
    behind = ", ".join(f"{g[0, 0]:.4f}" for g in clipped(norms))
    print(f"{who:22} norm {found}, a dense gradient behind clipping {behind}")
for n in right:
    assert_close(n, one)
assert not torch.allclose(wrong[0], wrong[1])
assert not torch.allclose(*clipped(wrong))
print(
    "how to see it in your framework: print the norm by which each rank clips, in one process and in a layout with experts, "
    "tensors or stages on several ranks; all must be equal."
)
