"""A rank takes tokens for another expert's.

Rows arrive at an expert-parallel rank sorted by expert, with a count of each expert.  Which of them are whose follows from the
counts of the rank's own experts; numbers within the rank and numbers among all experts are the same on the first rank alone.
With the counts of the first experts, any other rank cuts its rows at wrong places.

Reported as https://github.com/vllm-project/vllm-gaudi/pull/1796, where such tokens were dropped
The same in this project (rows stay in the order in which they arrive):
python tools/verify_layouts.py model=tiny --ranks 4 --plant rows_not_regrouped
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS, EXPERTS, OWN = 2, 4, 2  # OWN: experts of a rank
x, experts = torch.randn(16, 8), torch.randn(EXPERTS, 8, 8)
expert_of = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3])[torch.randperm(16)]
counts = torch.bincount(expert_of, minlength=EXPERTS)


def on_rank(rank: int, first: int) -> Tensor:
    """The outputs of a rank's rows, which are sorted by expert.  `first`: of the experts whose counts it takes."""
    rows = torch.cat([x[expert_of == e] for e in range(rank * OWN, (rank + 1) * OWN)])
    ends = counts[first : first + OWN].cumsum(0)
    own_number = torch.bucketize(torch.arange(len(rows)), ends, right=True).clamp(max=OWN - 1)
    return torch.einsum("td,tdo->to", rows, experts[rank * OWN + own_number])


print(f"tokens of each expert: {counts.tolist()}")
for rank in range(RANKS):
    one = torch.cat([x[expert_of == e] @ experts[e] for e in range(rank * OWN, (rank + 1) * OWN)])
    right, wrong = on_rank(rank, first=rank * OWN), on_rank(rank, first=0)
    for who, out in (("one process", one), ("ep=2", right), ("with the bug, ep=2", wrong)):
        differing = (out - one).norm(dim=1).gt(1e-12).sum()
        print(f"{who:19} outputs of the experts of rank {rank}: norm {out.norm():.4f}, {differing} of {len(out)} rows differ")
    assert_close(right, one)
    assert torch.allclose(wrong, one) == (rank == 0)
print(
    "how to see it in your framework: print the outputs of the last rank's experts, and the same with ep=1; both must be equal."
)
