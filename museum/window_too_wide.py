"""A sliding window of W tokens is passed to a kernel that adds the token itself: W + 1.

A model's window counts the token; many kernels take the number of tokens to the left of it.  Short sequences don't show it, and
neither does the loss: a model with one token more does a little better.

Reported as https://github.com/huggingface/transformers/issues/39408 and https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/2656
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant window_too_wide
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
HEADS, TOKENS, WIDTH, WINDOW = 2, 12, 8, 4
q, k, v = torch.randn(3, HEADS, TOKENS, WIDTH)


def one_token(i: int) -> Tensor:
    """[head, width]: attention of a token to the last WINDOW tokens, itself included."""
    seen = slice(max(0, i - WINDOW + 1), i + 1)
    scores = torch.einsum("hd,hsd->hs", q[:, i], k[:, seen]) / WIDTH**0.5
    return torch.einsum("hs,hsd->hd", scores.softmax(1), v[:, seen])


def kernel(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    """A token sees `left` tokens before it, and itself."""
    before = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    scores = (q @ k.mT / WIDTH**0.5).masked_fill((before < 0) | (before > left), float("-inf"))
    return scores.softmax(-1) @ v


def on_ranks(left: int) -> Tensor:
    """tp=2: a rank has a head."""
    return torch.cat([kernel(*own, left) for own in zip(q.chunk(2), k.chunk(2), v.chunk(2))])


one = torch.stack([one_token(i) for i in range(TOKENS)], 1)
right, wrong = on_ranks(WINDOW - 1), on_ranks(WINDOW)
for who, out in (("one process", one), ("tp=2", right), ("with the bug, tp=2", wrong)):
    norms = ", ".join(f"{n:.4f}" for n in out[0, WINDOW - 2 : WINDOW + 2].norm(dim=1))
    differing = (out - one).abs().amax((0, 2)).gt(1e-12).nonzero().flatten().tolist()
    print(f"{who:19} output at positions {WINDOW - 2} to {WINDOW + 1}: norms {norms}; differs at {differing}")
assert_close(right, one)
assert_close(wrong[:, :WINDOW], one[:, :WINDOW])
assert not torch.isclose(wrong[:, WINDOW:], one[:, WINDOW:]).all(2).any()
print(
    "how to see it in your framework: print attention's output with your kernel, and with a mask written by hand; they must be "
    "equal at position W, the first that doesn't see all before it."
)
