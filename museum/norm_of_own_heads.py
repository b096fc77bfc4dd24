"""A norm over all heads' queries takes the heads of its own rank.

Some models norm queries (and keys) over all heads together.  With tensor parallelism a rank has a part of the heads: the squares
have to be summed over the ranks, which a norm that was written for one process doesn't do.

Reported as https://github.com/EleutherAI/gpt-neox/pull/1424
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant norm_of_own_heads
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
TP, TOKENS, HEADS, WIDTH = 2, 4, 4, 8
x, weight = torch.randn(TOKENS, 16), torch.randn(HEADS * WIDTH, 16)
weight[: HEADS * WIDTH // 2] *= 2  # heads are unlike
scale = torch.rand(HEADS * WIDTH)


def norm_of_rank(queries: Tensor, scale: Tensor) -> Tensor:
    return rms_norm(queries, queries.shape[-1:], scale, eps=1e-6)


def on_ranks(summed: bool) -> Tensor:
    own = [x @ rows.T for rows in weight.chunk(TP)]
    scales = scale.chunk(TP)
    if not summed:
        return torch.cat([norm_of_rank(q, s) for q, s in zip(own, scales)], 1)
    squares = sum(q.square().sum(1, keepdim=True) for q in own)  # an all-reduce
    return torch.cat([q * (squares / len(weight) + 1e-6).rsqrt() * s for q, s in zip(own, scales)], 1)


one = norm_of_rank(x @ weight.T, scale)
right, wrong = on_ranks(summed=True), on_ranks(summed=False)
for who, queries in (("tp=1", one), ("tp=2", right), ("with the bug, tp=2", wrong)):
    norms = ", ".join(f"{n:.4f}" for n in queries[0].unflatten(0, (HEADS, WIDTH)).norm(dim=1))
    print(f"{who:19} queries of a token behind the norm, head by head: norms {norms}")
assert_close(right, one)
assert not torch.allclose(wrong, one)
print("how to see it in your framework: print the queries behind the norm with tp=1 and with tp=2; they must be equal.")
