"""Queries and keys are clipped by the largest logit of the rank's own sequences.

QK-clip scales a head's weights down when its largest attention logit exceeds a limit.  Each data-parallel rank has other
sequences and another largest logit, and scales its copy of the weights by another factor; gradients are equal, weights aren't.

Reported as https://github.com/modelscope/ms-swift/pull/9901
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant qk_clip_per_rank
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS, LIMIT = 2, 4.0
sequences = torch.randn(4, 6, 8) * torch.tensor([1.0, 1.0, 2.0, 1.5])[:, None, None]
queries, keys = torch.randn(2, 8, 8)  # weights


def largest_logit(held: Tensor) -> Tensor:
    return ((held @ queries) @ (held @ keys).mT / 8**0.5).max()


def clipped(largest: Tensor) -> Tensor:
    """The weights of the queries; those of the keys get the other half of the factor."""
    return queries * (LIMIT / largest).clamp(max=1.0).sqrt()


def on_ranks(over_all: bool) -> list[Tensor]:
    """The weights of each rank after a step."""
    own = [largest_logit(held) for held in sequences.chunk(RANKS)]
    return [clipped(torch.stack(own).max() if over_all else largest) for largest in own]  # an all-reduce of maxima


one = clipped(largest_logit(sequences))
right, wrong = on_ranks(over_all=True), on_ranks(over_all=False)
print(f"{'one process':22} weights of the queries after a step: norm {one.norm():.4f}")
for who, found in (("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    print(f"{who:22} weights of the queries after a step, on each rank: norms {', '.join(f'{w.norm():.4f}' for w in found)}")
for weights in right:
    assert_close(weights, one)
assert not torch.allclose(*wrong)
assert one.norm() < queries.norm()
print("how to see it in your framework: print the query weights on each data-parallel rank after a step; they must be equal.")
