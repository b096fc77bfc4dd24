"""Forward runs with weights of the step before, as their gather has not arrived.

With ZeRO-1 each rank updates a part of the weights, and gathers the others' parts while forward begins: when a bucket of weights
is used, the next one's gather starts.  The next in the order of memory, that is.  A bucket that is used out of turn has no gather
to wait for, and forward takes it as it is: new where the rank has updated it, old elsewhere.
Reported as https://github.com/NVIDIA/Megatron-LM/issues/950
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant stale_zero_shard
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS, BUCKETS = 2, 3
old, update = torch.randn(BUCKETS, 8), torch.randn(BUCKETS, 8)
new = old - 0.1 * update


class Weights:
    """On a rank, after the step: its half of each bucket is new."""

    def __init__(self, rank: int):
        self.held = old.clone()
        own = slice(rank * 8 // RANKS, (rank + 1) * 8 // RANKS)
        self.held[:, own] = new[:, own]
        self.started = {0}

    def used(self, bucket: int, next_bucket: int | None) -> Tensor:
        """What forward gets: it waits for the gather, if one has started, and starts the next."""
        if bucket in self.started:
            self.held[bucket] = new[bucket]
        if next_bucket is not None:
            self.started.add(next_bucket)
        return self.held[bucket].clone()


def forward(rank: int, order: list[int], order_of_gathers: list[int]) -> Tensor:
    """The weights that it uses, bucket by bucket."""
    weights, found = Weights(rank), torch.zeros_like(old)
    following = dict(zip(order_of_gathers, order_of_gathers[1:]))
    for bucket in order:
        found[bucket] = weights.used(bucket, following.get(bucket))
    return found


order = [0, 2, 1]  # of the layers; in memory, 1 is before 2
right = [forward(rank, order, order) for rank in range(RANKS)]
wrong = [forward(rank, order, [0, 1, 2]) for rank in range(RANKS)]
print(f"{'one process':22} weights after a step, bucket 2: {new[2].norm():.4f}")
for who, found in (("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    print(f"{who:22} weights that forward uses on each rank, bucket 2: {', '.join(f'{w[2].norm():.4f}' for w in found)}")
for found in right:
    assert_close(found, new)
assert not torch.allclose(*wrong)
print("how to see it in your framework: print the weights that forward uses on each rank after a step; they must be equal.")
