"""Muon takes all experts of a rank for one matrix.

Experts lie in one tensor, expert by row by column.  Muon makes the update of a matrix orthogonal; a tensor of three dimensions is
flattened to two first, as it is for convolutions, so that each expert becomes a row.  An expert's update is then no longer
orthogonal by itself, and it depends on which experts lie together on a rank.

Reported of Moonlight's first Muon
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant experts_flattened
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
EXPERTS, WIDTH = 4, 6
gradients = torch.randn(EXPERTS, WIDTH, WIDTH)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest to each; Newton-Schulz iterations come close to it."""
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u @ vh


def by_expert(held: Tensor) -> Tensor:
    return orthogonal(held)


def flattened(held: Tensor) -> Tensor:
    return orthogonal(held.flatten(1)).view_as(held)


one = torch.stack([orthogonal(g) for g in gradients])
right = torch.cat([by_expert(held) for held in gradients.chunk(2)])
wrong = {ranks: torch.cat([flattened(held) for held in gradients.chunk(ranks)]) for ranks in (1, 2)}
shown = {"one process": one, "2 ranks": right, "with the bug, 1 rank": wrong[1], "with the bug, 2 ranks": wrong[2]}
for who, update in shown.items():
    values = torch.linalg.svdvals(update[0])
    print(f"{who:22} update of expert 0: singular values {values.min():.4f} to {values.max():.4f}, norm {update[0].norm():.4f}")
assert_close(right, one)
for ranks in (1, 2):
    assert not torch.allclose(torch.linalg.svdvals(wrong[ranks]), torch.ones(EXPERTS, WIDTH))
assert not torch.allclose(wrong[1], wrong[2])
print(
    "how to see it in your framework: print the singular values of one expert's update, with one expert on a rank and with "
    "several; all must be near 1 (times the learning rate), and equal."
)
