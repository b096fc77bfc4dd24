"""All experts on every row, their weighted outputs summed, as one autograd node (DS-MoE, Pan et al. 2024, equations 1 to 3).

The second matrix is linear, so what it reads is scaled in place of what it gives, and one product takes all experts: it sums over
their hidden widths, one after another.

Shapes: N rows, E experts, D model width, F hidden width of one expert, H = 2F if gated, else F; EF and EH are all experts'.
Gradients of parameters with `main_grad` are added there, see linear.py.  Saved for backward: the rows, their weights and what the
first matrix gave; the activation is computed again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.blocks.activation import Activation
from megalina.model.activation import activate, activate_backward
from megalina.model.late_gradients import LateGradient, Later
from megalina.model.linear import add_outer, add_rows, main_grad


def all_experts_mlp(
    x_ND: Tensor,
    weight_NE: Tensor,
    w1_EHD: Tensor,
    w2_EDF: Tensor,
    b1_EH: Tensor | None = None,
    b2_ED: Tensor | None = None,
    *,
    activation: Activation,
    later: Later | None = None,
) -> Tensor:
    """[N, D]: the sum over experts of weight x output.  `weight_NE` may be of higher precision than the rows.

    `later`: the backward pass puts there what adds the gradients of weights, and leaves them out itself; they need `main_grad`.
    """
    if weight_NE.shape != (len(x_ND), len(w1_EHD)):
        raise ValueError(f"weights of {list(weight_NE.shape)} for {len(x_ND)} rows and {len(w1_EHD)} experts")
    return _AllExperts.apply(x_ND, weight_NE, w1_EHD, w2_EDF, b1_EH, b2_ED, activation, later)


class _AllExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_NE: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, b1_EH: Tensor | None, b2_ED: Tensor | None,
        activation: Activation, later: Later | None,
    ) -> Tensor:  # fmt: skip
        assert w1_EHD.shape[1] == activation.inputs * w2_EDF.shape[2]
        first_XD = w1_EHD.flatten(0, 1)  # X = EH
        h_NX = torch.mm(x_ND, first_XD.t()) if b1_EH is None else torch.addmm(b1_EH.flatten(), x_ND, first_XD.t())
        u_NEF = _scaled(_activated(h_NX, weight_NE, w2_EDF.shape[2], activation), weight_NE)
        y_ND = torch.mm(u_NEF.flatten(1), _by_rows(w2_EDF))
        if b2_ED is not None:
            y_ND += torch.mm(weight_NE, b2_ED.to(weight_NE.dtype)).to(y_ND.dtype)
        ctx.save_for_backward(x_ND, weight_NE, h_NX, w1_EHD, w2_EDF, b2_ED)
        ctx.main_grads = [main_grad(p) for p in (w1_EHD, w2_EDF, b1_EH, b2_ED)]
        ctx.shapes = [None if p is None else p.shape for p in (w1_EHD, w2_EDF, b1_EH, b2_ED)]
        ctx.activation, ctx.later = activation, later
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NE, h_NX, w1_EHD, w2_EDF, b2_ED = ctx.saved_tensors
        returned: list[Tensor | None] = [None] * 4  # gradients that autograd gets
        grads: list[Tensor | None] = [None] * 4  # where to add
        for i, (needed, buffer, shape) in enumerate(zip(ctx.needs_input_grad[2:6], ctx.main_grads, ctx.shapes, strict=True)):
            if needed:
                if buffer is None:
                    buffer = returned[i] = w1_EHD.new_zeros(shape)
                grads[i] = buffer
        dy_ND = dy_ND.contiguous()
        du_NEF = torch.mm(dy_ND, _by_rows(w2_EDF).t()).view(*weight_NE.shape, w2_EDF.shape[2])
        da_NEF, dh_NX, a_NEF = _scaled(du_NEF.clone(), weight_NE), torch.empty_like(h_NX), torch.empty_like(du_NEF)
        h_nH = h_NX.view(weight_NE.numel(), w1_EHD.shape[1])  # a row for each expert of each row
        activate_backward(da_NEF.flatten(0, 1), h_nH, ctx.activation, dh_NX.view(h_nH.shape), a_NEF.flatten(0, 1))
        del da_NEF
        dweight_NE = None
        if ctx.needs_input_grad[1]:
            dweight_NE = torch.linalg.vecdot(du_NEF.to(weight_NE.dtype), a_NEF.to(weight_NE.dtype))
            if b2_ED is not None:
                dweight_NE.addmm_(dy_ND.to(weight_NE.dtype), b2_ED.to(weight_NE.dtype).t())
        del du_NEF
        if ctx.later is None:
            _add(x_ND, weight_NE, dh_NX, _scaled(a_NEF, weight_NE), dy_ND, grads)
        else:
            assert all(r is None for r in returned), "weights without main_grad have no later"
            width = w2_EDF.shape[2]
            add = partial(_add_later, grads=grads, width=width, activation=ctx.activation)
            ctx.later.append(LateGradient(add, (x_ND, weight_NE, h_NX, dh_NX, dy_ND)))
        dx_ND = torch.mm(dh_NX, w1_EHD.flatten(0, 1)) if ctx.needs_input_grad[0] else None
        return dx_ND, dweight_NE, *returned, None, None


def _activated(h_NX: Tensor, weight_NE: Tensor, width: int, activation: Activation) -> Tensor:
    """[N, E, F] of what the first matrices gave."""
    a_NEF = h_NX.new_empty(*weight_NE.shape, width)
    h_nH = h_NX.view(weight_NE.numel(), h_NX.shape[1] // weight_NE.shape[1])
    activate(h_nH, activation, a_NEF.flatten(0, 1))
    return a_NEF


def _scaled(a_NEF: Tensor, weight_NE: Tensor) -> Tensor:
    """In place where types are the same; else the product is taken in the weights' type."""
    if a_NEF.dtype == weight_NE.dtype:
        return a_NEF.mul_(weight_NE.unsqueeze(2))
    return (a_NEF * weight_NE.unsqueeze(2)).to(a_NEF.dtype)


def _by_rows(w2_EDF: Tensor) -> Tensor:
    """[EF, D]: all experts' second matrices below one another, a copy."""
    return w2_EDF.transpose(1, 2).flatten(0, 1)


def _add(
    x_ND: Tensor, weight_NE: Tensor, dh_NX: Tensor, u_NEF: Tensor, dy_ND: Tensor, grads: list[Tensor | None]
) -> None:  # fmt: skip
    """To those gradients of weights that there are."""
    w1_grad, w2_grad, b1_grad, b2_grad = grads
    if w1_grad is not None:
        add_outer(w1_grad.view(-1, w1_grad.shape[2]), dh_NX, x_ND)
    if w2_grad is not None:
        for e in range(len(w2_grad)):
            add_outer(w2_grad[e], dy_ND, u_NEF[:, e])
    if b1_grad is not None:
        add_rows(b1_grad.view(-1), dh_NX)
    if b2_grad is not None:
        b2_grad.add_(torch.mm(weight_NE.t(), dy_ND.to(weight_NE.dtype)))


def _add_later(
    x_ND: Tensor,
    weight_NE: Tensor,
    h_NX: Tensor,
    dh_NX: Tensor,
    dy_ND: Tensor,
    grads: list[Tensor | None],
    width: int,
    activation: Activation,
) -> None:
    _add(x_ND, weight_NE, dh_NX, _scaled(_activated(h_NX, weight_NE, width, activation), weight_NE), dy_ND, grads)
