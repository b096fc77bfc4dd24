"""Recomputation counts an expert's tokens twice, so its bias moves too far.

The router counts the tokens of its experts when it runs.  Where activations are recomputed, backward runs it again.  A bias that
moves by a sign doesn't notice, until only some layers or micro-batches are recomputed; one that moves by the load goes too far.

Reported in a comment in torchtitan's optimizer, which halves the counts
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant load_counted_again
"""

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
EXPERTS, RATE = 4, 0.1
x, weight = torch.randn(32, 8), torch.randn(8, EXPERTS)


class Router(nn.Module):
    def __init__(self, counts_by_itself: bool):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.counts_by_itself = counts_by_itself
        self.load = torch.zeros(EXPERTS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        score = (tokens @ self.weight).sigmoid()
        chosen = score.argmax(1, keepdim=True)
        if self.counts_by_itself:
            self.count(chosen)
        return score.gather(1, chosen), chosen

    def count(self, chosen: Tensor) -> None:
        self.load += torch.bincount(chosen.flatten(), minlength=EXPERTS)


def bias(ranks: int, recompute: bool, counts_by_itself: bool) -> Tensor:
    """The selection bias after a step: an expert's is raised by what its share lacks."""
    router = Router(counts_by_itself)
    for own in x.chunk(ranks):
        scores, chosen = checkpoint(router, own, use_reentrant=False) if recompute else router(own)
        if not counts_by_itself:
            router.count(chosen)  # outside of what is recomputed
        scores.sum().backward()
    return RATE * (1 / EXPERTS - router.load / len(x))  # loads are summed over ranks


one = bias(1, recompute=False, counts_by_itself=True)
right, wrong = bias(2, recompute=True, counts_by_itself=False), bias(2, recompute=True, counts_by_itself=True)
for who, found in (("one process", one), ("2 ranks, recompute", right), ("with the bug, recompute", wrong)):
    print(f"{who:24} selection bias {', '.join(f'{b:+.4f}' for b in found)}; sum {found.sum() + 0.0:+.4f}")
assert_close(right, one)
assert_close(bias(2, recompute=False, counts_by_itself=True), one)
assert not torch.allclose(wrong, one)
print("how to see it in your framework: print the selection bias after a step, without and with recompute; both must be equal.")
