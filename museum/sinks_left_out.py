"""Packed sequences take a kernel that ignores attention sinks.

A sink is a learned number of a head that takes part in each softmax, and belongs to no token.  The kernel for packed sequences
accepts it among its arguments, and has no use for it: outputs are a little too large, and the sinks are never trained.

Reported as https://github.com/NVIDIA-NeMo/RL/issues/1672
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant sinks_left_out
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
HEADS, WIDTH, LENGTHS = 2, 8, (5, 3)
q, k, v = torch.randn(3, HEADS, sum(LENGTHS), WIDTH)
document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def softmax_with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    column = sink[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, column], 2).softmax(2)[:, :, :-1]


def one_sequence(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return softmax_with_sink((q @ k.mT / WIDTH**0.5).masked_fill(later, float("-inf")), sink) @ v


def packed(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, uses_sink: bool) -> Tensor:
    unseen = torch.ones(len(document), len(document), dtype=torch.bool).triu(1) | (document[:, None] != document)
    scores = (q @ k.mT / WIDTH**0.5).masked_fill(unseen, float("-inf"))
    return (softmax_with_sink(scores, sink) if uses_sink else scores.softmax(2)) @ v


def gradient(how: str) -> Tensor:
    """Of the sinks."""
    sink = torch.zeros(HEADS, requires_grad=True)
    if how == "by itself":
        parts = (tensor.split(LENGTHS, 1) for tensor in (q, k, v))
        out = torch.cat([one_sequence(*sequence, sink) for sequence in zip(*parts)], 1)
    else:  # tp=2: a rank has a head
        ranks = ((q[[h]], k[[h]], v[[h]], sink[[h]]) for h in range(HEADS))
        out = torch.cat([packed(*held, how == "packed") for held in ranks])
    (out.square().sum() + 0 * sink.sum()).backward()
    return sink.grad


one, right, wrong = gradient("by itself"), gradient("packed"), gradient("packed, without sinks")
for who, found in (("each by itself", one), ("packed, tp=2", right), ("with the bug", wrong)):
    print(f"{who:15} gradient of the sinks: {', '.join(f'{g:.4f}' for g in found)}")
assert_close(right, one)
assert one.all()
assert not wrong.any()
print("how to see it in your framework: print the sinks' gradient for sequences packed and each by itself; both must be equal.")
