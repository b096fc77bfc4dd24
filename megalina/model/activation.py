"""The activation between the two matrices of an MLP: forward and backward, written into given memory.

SwiGLU reads gate and up from one row of 2F numbers, the gate's F first; GELU (exact) and ReLU read F numbers.
Shapes: N rows, F hidden width.
"""

import torch
from torch import Tensor

from megalina.config import ModelConfig, choices_of

ACTIVATIONS = choices_of(ModelConfig, "activation")
aten = torch.ops.aten


def input_width(activation: str, d_ff: int) -> int:
    """Numbers a row that the activation reads to give `d_ff`.  ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return 2 * d_ff if activation == "swiglu" else d_ff


def activate(h: Tensor, activation: str, out_NF: Tensor) -> None:
    """out = activation(h); h is [N, 2F] for swiglu, else [N, F]."""
    if activation == "swiglu":
        gate_NF, up_NF = h.chunk(2, dim=-1)
        aten.silu(gate_NF, out=out_NF).mul_(up_NF)
    elif activation == "gelu":
        aten.gelu(h, out=out_NF)
    else:
        torch.clamp(h, min=0, out=out_NF)


def activate_backward(da_NF: Tensor, h: Tensor, activation: str, dh_out: Tensor, a_out_NF: Tensor) -> None:
    """Gradient of h, given `da_NF`, that of the activation's result; and the result once more, which shares the work."""
    if activation == "swiglu":
        gate_NF, up_NF = h.chunk(2, dim=-1)
        dgate_NF, dup_NF = dh_out.chunk(2, dim=-1)
        silu_NF = aten.silu(gate_NF, out=dup_NF)
        torch.mul(silu_NF, up_NF, out=a_out_NF)
        torch.mul(da_NF, up_NF, out=dgate_NF)
        aten.silu_backward(dgate_NF, gate_NF, grad_input=dgate_NF)
        dup_NF.mul_(da_NF)
    elif activation == "gelu":
        aten.gelu(h, out=a_out_NF)
        aten.gelu_backward(da_NF, h, grad_input=dh_out)
    else:
        torch.clamp(h, min=0, out=a_out_NF)
        aten.threshold_backward(da_NF, h, 0, grad_input=dh_out)
