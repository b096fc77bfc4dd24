"""Ranks that hold copies of a tensor drop different elements of it.

Outside of what tensor parallelism cuts, each rank of the group has the same activations, and has to drop the same of them: the
noise must not depend on the rank.  Where it does, copies differ, and so do gradients of weights that all ranks have.

Reported as https://github.com/NVIDIA/Megatron-LM/pull/206 and https://github.com/NVIDIA/Megatron-LM/pull/4828
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant dropout_per_rank
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
TP, SEED, P = 2, 1234, 0.4
x, weight = torch.randn(8, 16), torch.randn(16, 16)


def dropped(whole: Tensor, seed: int) -> Tensor:
    kept = torch.rand(whole.shape, generator=torch.Generator().manual_seed(seed)) >= P
    return whole * kept / (1 - P)


def on_ranks(noise_of_rank: bool) -> list[Tensor]:
    """The tensor behind dropout, on each rank.  Before it, ranks have parts of a sum over the inputs of a matrix."""
    parts = [own @ rows for own, rows in zip(x.chunk(TP, 1), weight.chunk(TP))]
    return [dropped(sum(parts), SEED + rank if noise_of_rank else SEED) for rank in range(TP)]


def zeros(tensor: Tensor) -> list[int]:
    return (tensor[0] == 0).nonzero().flatten().tolist()


one = dropped(x @ weight, SEED)
right, wrong = on_ranks(noise_of_rank=False), on_ranks(noise_of_rank=True)
print(f"{'one process':19} elements of a token that are dropped: {zeros(one)}")
for who, found in (("tp=2", right), ("with the bug, tp=2", wrong)):
    print(f"{who:19} elements of a token that are dropped, on each rank: {' and '.join(str(zeros(t)) for t in found)}")
for tensor in right:
    assert_close(tensor, one)
assert not torch.allclose(*wrong)
print(
    "how to see it in your framework: print a tensor behind dropout on each rank of a tensor-parallel group; outside of what is "
    "cut it must be equal."
)
