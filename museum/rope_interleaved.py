"""Frequencies in one order, rotation of pairs in the other.

A rotary embedding turns pairs of numbers: neighbours, or a number of the first half with one of the second.  The table of angles
has to be in the same order.  Angles for halves with pairs of neighbours turn the two numbers of a pair by two angles, which is no
rotation: lengths change.  Position 0 isn't turned at all, and is right.

Reported as https://github.com/NVIDIA/Megatron-LM/issues/3900
The same in this project (queries as neighbours, keys as halves):
python tools/verify_layouts.py model=deepseek_v2_lite --ranks 4 --plant rope_interleaved
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
HEADS, TOKENS, WIDTH = 2, 6, 8
q, k, v = torch.randn(3, HEADS, TOKENS, WIDTH)
angles = torch.arange(TOKENS)[:, None] * 10_000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)  # position by pair


def turned_as_complex(x: Tensor) -> Tensor:
    """Pairs of neighbours, without any table to mistake."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def turned(x: Tensor, table: Tensor) -> Tensor:
    neighbours = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * table.cos() + neighbours * table.sin()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return (q @ k.mT / WIDTH**0.5).masked_fill(later, float("-inf")).softmax(-1) @ v


def on_ranks(table: Tensor) -> Tensor:
    """tp=2: a rank has a head."""
    return torch.cat([attention(turned(q[h], table), turned(k[h], table), v[h])[None] for h in range(HEADS)])


for_neighbours, for_halves = angles.repeat_interleave(2, 1), torch.cat([angles, angles], 1)
one = attention(turned_as_complex(q), turned_as_complex(k), v)
right, wrong = on_ranks(for_neighbours), on_ranks(for_halves)
for who, out, table in (("tp=2", right, for_neighbours), ("with the bug, tp=2", wrong, for_halves)):
    errors = ", ".join(f"{e:.4f}" for e in (out - one).norm(dim=2)[0, :3])
    longer = (turned(q, table).norm(dim=2) / q.norm(dim=2))[0, 1]
    print(f"{who:19} output minus that of one process at positions 0, 1, 2: {errors}; a query at 1 gets {longer:.4f} as long")
assert_close(right, one)
assert_close(wrong[:, 0], one[:, 0])
assert not torch.allclose(wrong[:, 1], one[:, 1])
print("how to see it in your framework: print a query's length before and behind the rotation at position 1; both must be equal.")
