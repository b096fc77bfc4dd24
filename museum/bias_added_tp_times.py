"""Every rank adds the bias of a row-parallel matrix before the sum.

A row-parallel matrix is cut along its inputs, and the ranks' outputs are summed.  Its bias isn't cut.  Where each rank computes a
whole linear layer with its rows, the bias is in the sum once for each rank.

Reported as https://github.com/huggingface/text-generation-inference/issues/1036 and https://github.com/Wenyueh/MinivLLM/issues/80
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant bias_added_tp_times
"""

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, weight, bias = torch.randn(4, 16), torch.randn(8, 16), torch.randn(8)


def row_parallel(tp: int, who_adds: range) -> Tensor:
    """`who_adds`: the ranks that add the bias."""
    parts = zip(x.chunk(tp, 1), weight.chunk(tp, 1))
    outputs = [linear(own, rows, bias if rank in who_adds else None) for rank, (own, rows) in enumerate(parts)]
    return sum(outputs)  # an all-reduce


one = linear(x, weight, bias)
print(f"{'one process':20} output: norm {one.norm():.4f}")
for tp in (2, 4):
    right, wrong = row_parallel(tp, range(1)), row_parallel(tp, range(tp))
    for who, out in ((f"tp={tp}", right), (f"with the bug, tp={tp}", wrong)):
        times = ((out - one) / bias).mean() + 0.0
        print(f"{who:20} output: norm {out.norm():.4f}, minus that of one process: {times.abs():.2f} times the bias")
    assert_close(right, one)
    assert_close(wrong, one + (tp - 1) * bias)
print(
    "how to see it in your framework: set the bias to something large, and print the layer's output with tp=1 and with tp=2; "
    "both must be equal."
)
