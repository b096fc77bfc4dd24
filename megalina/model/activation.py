"""The activation between the two matrices of an MLP: forward and backward, written into given memory.

SwiGLU reads gate and up from one row of 2F numbers, the gate's F first; GELU (exact) and ReLU read F numbers.  The clamped gated
unit is gpt-oss's (arXiv:2508.10925, section 2.3): gate x sigmoid(1.702 gate) x (up + 1), the gate at most the limit, up within
+- the limit; what is clamped has no gradient.
Shapes: N rows, F hidden width.
"""

import torch
from torch import Tensor

from megalina.blocks.activation import Activation

SLOPE = 1.702  # of the sigmoid, which makes gate x sigmoid close to GELU
aten = torch.ops.aten  # with the overload named, which the dispatcher would look for at each call


def activate(h: Tensor, activation: Activation, out_NF: Tensor) -> None:
    """out = activation(h); h is [N, 2F] for gated ones, else [N, F]."""
    match activation.name:
        case "swiglu":
            gate_NF, up_NF = h.chunk(2, dim=-1)
            aten.silu.out(gate_NF, out=out_NF).mul_(up_NF)
        case "swiglu_clamped":
            gate_NF, up_NF = h.chunk(2, dim=-1)
            torch.clamp(gate_NF, max=activation.limit, out=out_NF)
            scratch_NF = torch.mul(out_NF, SLOPE).sigmoid_()
            out_NF.mul_(scratch_NF)
            torch.clamp(up_NF, -activation.limit, activation.limit, out=scratch_NF)
            out_NF.mul_(scratch_NF.add_(1))
        case "gelu":
            aten.gelu.out(h, out=out_NF)
        case _:
            torch.clamp(h, min=0, out=out_NF)


def activate_backward(da_NF: Tensor, h: Tensor, activation: Activation, dh_out: Tensor, a_out_NF: Tensor) -> None:
    """Gradient of h, given `da_NF`, that of the activation's result; and the result once more, which shares the work."""
    match activation.name:
        case "swiglu":
            gate_NF, up_NF = h.chunk(2, dim=-1)
            dgate_NF, dup_NF = dh_out.chunk(2, dim=-1)
            silu_NF = aten.silu.out(gate_NF, out=dup_NF)
            torch.mul(silu_NF, up_NF, out=a_out_NF)
            torch.mul(da_NF, up_NF, out=dgate_NF)
            aten.silu_backward.grad_input(dgate_NF, gate_NF, grad_input=dgate_NF)
            dup_NF.mul_(da_NF)
        case "swiglu_clamped":
            _clamped_backward(da_NF, h, activation.limit, dh_out, a_out_NF)
        case "gelu":
            aten.gelu.out(h, out=a_out_NF)
            aten.gelu_backward.grad_input(da_NF, h, grad_input=dh_out)
        case _:
            torch.clamp(h, min=0, out=a_out_NF)
            aten.threshold_backward.grad_input(da_NF, h, 0, grad_input=dh_out)


def _clamped_backward(da_NF: Tensor, h: Tensor, limit: float, dh_out: Tensor, a_out_NF: Tensor) -> None:
    """With g and u the clamped inputs, s = sigmoid(SLOPE g): the result is g s (u + 1)."""
    gate_NF, up_NF = h.chunk(2, dim=-1)
    dgate_NF, dup_NF = dh_out.chunk(2, dim=-1)
    glu_NF = torch.clamp(gate_NF, max=limit, out=dup_NF)
    torch.mul(glu_NF, SLOPE, out=dgate_NF).sigmoid_()
    glu_NF.mul_(dgate_NF)
    dgate_NF.addcmul_(dgate_NF, glu_NF, value=-SLOPE).add_(glu_NF, alpha=SLOPE)  # s + SLOPE g s (1 - s)
    above_NF = torch.clamp(up_NF, -limit, limit, out=a_out_NF).add_(1)
    dgate_NF.mul_(above_NF).mul_(da_NF).masked_fill_(gate_NF > limit, 0)
    a_out_NF.mul_(glu_NF)
    dup_NF.mul_(da_NF).masked_fill_(up_NF > limit, 0).masked_fill_(up_NF < -limit, 0)
