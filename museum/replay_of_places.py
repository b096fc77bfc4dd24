"""An expert's number is taken for its place on the ranks, or the reverse.

Experts are moved between ranks so that ranks have as much to do; from then on an expert's number is not where it lies.  Choices
that were recorded as numbers (by the server that generated the text) are replayed as places, and tokens go to other experts.

Reported as https://github.com/vllm-project/vllm/issues/18343 and https://github.com/sgl-project/sglang/issues/18213
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant replay_of_places
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS, EXPERTS = 2, 4
x, experts = torch.randn(8, 8), torch.randn(EXPERTS, 8, 8)
recorded = torch.randint(EXPERTS, (8,))  # of each token, the number of its expert
expert_at = torch.tensor([2, 0, 3, 1])  # of each place; the first rank has the first two
place_of = expert_at.argsort()


class Rank:
    def __init__(self, rank: int):
        own = EXPERTS // RANKS
        self.places = range(rank * own, (rank + 1) * own)
        self.weights = {place: experts[expert_at[place]] for place in self.places}

    def output(self, place_of_token: Tensor) -> Tensor:
        """Of the tokens whose expert lies here, zero for the others."""
        out = torch.zeros_like(x)
        for place in self.places:
            here = place_of_token == place
            out[here] = x[here] @ self.weights[place]
        return out


def on_ranks(place_of_token: Tensor) -> Tensor:
    return sum(Rank(r).output(place_of_token) for r in range(RANKS))


one = torch.stack([row @ experts[e] for row, e in zip(x, recorded)])
right, wrong = on_ranks(place_of[recorded]), on_ranks(recorded)
print(f"{'one process':22} experts of the tokens {recorded.tolist()}, output: norm {one.norm():.4f}")
print(f"{'2 ranks':22} experts of the tokens {expert_at[place_of[recorded]].tolist()}, output: norm {right.norm():.4f}")
print(f"{'with the bug, 2 ranks':22} experts of the tokens {expert_at[recorded].tolist()}, output: norm {wrong.norm():.4f}")
assert_close(right, one)
assert not torch.allclose(wrong, one)
print(
    "how to see it in your framework: print the numbers of the experts that compute each token, before and after experts have "
    "moved, for the same recorded choices; both must be equal."
)
