"""The expert MLPs: rows sorted by expert go through the two matrices of their expert, as one autograd node.

Shapes: N rows, E experts, D model width, F hidden width, H = 2F for a gated activation (gate rows first, then up), else F.
Gradients of parameters with `main_grad` are added there, see linear.py.  Saved for backward: the rows and what the first
matrix gave (H numbers a row); the activation is computed again, which costs less than its memory traffic.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.blocks.activation import Activation
from megalina.model.activation import activate, activate_backward
from megalina.model.late_gradients import LateGradient, Later
from megalina.model.linear import add_outer, add_rows, main_grad

ROUND_ROWS = 64  # of an expert, in bfloat16 on CPU


def expert_mlp(
    x_ND: Tensor,
    count_E: list[int],
    w1_EHD: Tensor,
    w2_EDF: Tensor,
    b1_EH: Tensor | None = None,
    b2_ED: Tensor | None = None,
    *,
    activation: Activation,
    later: Later | None = None,
) -> Tensor:
    """Rows sorted by expert, `count_E` of them each; returns [N, D].  An expert without a row gets a zero gradient.

    `later`: the backward pass puts there what adds the gradients of weights, and leaves them out itself; they need `main_grad`.
    """
    if sum(count_E) != x_ND.shape[0] or len(count_E) != w1_EHD.shape[0]:
        raise ValueError(
            f"counts of {len(count_E)} experts sum to {sum(count_E)}, got {x_ND.shape[0]} rows and {w1_EHD.shape[0]} experts"
        )
    return _ExpertMlp.apply(x_ND, w1_EHD, w2_EDF, b1_EH, b2_ED, count_E, activation, later)


def mlp(
    x: Tensor,
    w1_HD: Tensor,
    w2_DF: Tensor,
    b1_H: Tensor | None = None,
    b2_D: Tensor | None = None,
    *,
    activation: Activation,
    later: Later | None = None,
) -> Tensor:
    """The MLP of a dense layer or of the shared experts: one expert that every row visits.  Any leading dims."""
    x_ND = x.reshape(-1, x.shape[-1])
    return _ExpertMlp.apply(x_ND, w1_HD, w2_DF, b1_H, b2_D, [x_ND.shape[0]], activation, later).view(x.shape)


def use_grouped_gemm(x_ND: Tensor, w1_EHD: Tensor, w2_EDF: Tensor) -> bool:
    """Whether `F.grouped_mm` runs these experts: on CUDA, in bfloat16, with strides in multiples of 16 bytes.

    On CPU it is itself a loop, and one that can't write into memory it is given.
    """
    aligned = all(width % 8 == 0 for width in (w1_EHD.shape[-2], w1_EHD.shape[-1], w2_EDF.shape[-1]))
    return x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and aligned and x_ND.shape[0] > 0


class _ExpertMlp(torch.autograd.Function):
    """Weights of one MLP may come without the expert dimension."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, count_E: list[int],
        activation: Activation, later: Later | None,
    ) -> Tensor:  # fmt: skip
        w1_EHD, w2_EDF, b1_EH, b2_ED = (_experts(w1, 3), _experts(w2, 3), _experts(b1, 2), _experts(b2, 2))
        assert w1_EHD is not None and w2_EDF is not None
        assert w1_EHD.shape[1] == activation.inputs * w2_EDF.shape[2]
        ctx.grouped = use_grouped_gemm(x_ND, w1_EHD, w2_EDF)
        run = _forward_grouped if ctx.grouped else _forward_loop
        y_ND, h_NH = run(x_ND, count_E, w1_EHD, w2_EDF, b1_EH, b2_ED, activation)
        ctx.save_for_backward(x_ND, h_NH, w1, w2)
        ctx.main_grads = [main_grad(p) for p in (w1, w2, b1, b2)]
        ctx.shapes = [None if p is None else p.shape for p in (w1, w2, b1, b2)]
        ctx.count_E, ctx.activation, ctx.later = count_E, activation, later
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_NH, w1, w2 = ctx.saved_tensors
        returned: list[Tensor | None] = [None] * 4  # gradients that autograd gets
        grads: list[Tensor | None] = [None] * 4  # [E, ...], where to add
        for i, (needed, buffer, shape) in enumerate(zip(ctx.needs_input_grad[1:5], ctx.main_grads, ctx.shapes, strict=True)):
            if needed:
                if buffer is None:
                    buffer = returned[i] = w1.new_zeros(shape)
                grads[i] = _experts(buffer, 3 if i < 2 else 2)
        run = _backward_grouped if ctx.grouped else _backward_loop
        w1_EHD, w2_EDF = _experts(w1, 3), _experts(w2, 3)
        assert w1_EHD is not None and w2_EDF is not None
        dy_ND, dh_NH, now = dy_ND.contiguous(), None, grads
        if ctx.later is not None:
            assert all(r is None for r in returned), "weights without main_grad have no later"
            dh_NH, now = torch.empty_like(h_NH), [None] * 4
        dx_ND = run(
            dy_ND, x_ND, h_NH, ctx.count_E, w1_EHD, w2_EDF, now, ctx.activation, needs_dx=ctx.needs_input_grad[0], dh_NH=dh_NH
        )
        if dh_NH is not None:
            add = _add_weights_grouped if ctx.grouped else _add_weights_loop
            add = partial(add, grads=grads, activation=ctx.activation, width=w2_EDF.shape[2])
            ctx.later.append(LateGradient(add, (dy_ND, x_ND, h_NH, dh_NH), ctx.count_E))
        return dx_ND, *returned, None, None, None


def _experts(parameter: Tensor | None, dims: int) -> Tensor | None:
    return parameter if parameter is None or parameter.dim() == dims else parameter.unsqueeze(0)


def _forward_loop(
    x_ND: Tensor,
    count_E: list[int],
    w1_EHD: Tensor,
    w2_EDF: Tensor,
    b1_EH: Tensor | None,
    b2_ED: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    h_NH = x_ND.new_empty(x_ND.shape[0], w1_EHD.shape[1])
    y_ND = torch.empty_like(x_ND)
    scratch_NF = x_ND.new_empty(_rounded(max(count_E), x_ND), w2_EDF.shape[2])  # stays in cache between the two GEMMs
    start = 0
    for e, count in enumerate(count_E):
        if count:
            rows, size = slice(start, start + count), _rounded(count, x_ND)
            h_nH, y_nD, a_nF = _room(h_NH[rows], size), _room(y_ND[rows], size), scratch_NF[:size]
            _project(_padded(x_ND[rows], size), w1_EHD[e], None if b1_EH is None else b1_EH[e], h_nH)
            activate(h_nH, activation, a_nF)
            _project(a_nF, w2_EDF[e], None if b2_ED is None else b2_ED[e], y_nD)
            _keep(h_nH, h_NH[rows])
            _keep(y_nD, y_ND[rows])
        start += count
    return y_ND, h_NH


def _rounded(count: int, x_ND: Tensor) -> int:
    """How many rows a product gets that has `count`.

    In bfloat16 on CPU oneDNN makes a kernel for each new number of rows, which takes ten times as long as the product; experts
    hardly ever have the same number twice."""
    if x_ND.dtype != torch.bfloat16 or x_ND.is_cuda:
        return count
    step = min(ROUND_ROWS, 1 << (count - 1).bit_length()) if count else 1  # few rows, as in decoding, stay few
    return -(-count // step) * step


def _padded(x_nD: Tensor, size: int) -> Tensor:
    """With rows of zeros at the end, which add nothing to the gradient of a weight."""
    return x_nD if len(x_nD) == size else F.pad(x_nD, (0, 0, 0, size - len(x_nD)))


def _room(out_nD: Tensor, size: int) -> Tensor:
    """Where a product of `size` rows may write, `out_nD` itself if it has as many."""
    return out_nD if len(out_nD) == size else out_nD.new_empty(size, out_nD.shape[1])


def _keep(room_nD: Tensor, out_nD: Tensor) -> None:
    if len(room_nD) != len(out_nD):
        out_nD.copy_(room_nD[: len(out_nD)])


def _project(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None, out_NF: Tensor) -> None:
    if bias_F is None:
        torch.mm(x_ND, weight_FD.t(), out=out_NF)
    else:
        torch.addmm(bias_F, x_ND, weight_FD.t(), out=out_NF)


def _backward_loop(
    dy_ND: Tensor,
    x_ND: Tensor,
    h_NH: Tensor,
    count_E: list[int],
    w1_EHD: Tensor,
    w2_EDF: Tensor,
    grads: list[Tensor | None],
    activation: Activation,
    *,
    needs_dx: bool,
    dh_NH: Tensor | None,
) -> Tensor | None:
    """`dh_NH`: memory for the gradient of what the first matrix gave; None: nobody needs it afterwards."""
    dx_ND = torch.empty_like(x_ND) if needs_dx else None
    most = _rounded(max(count_E), x_ND)
    a_scratch_NF, da_scratch_NF = x_ND.new_empty(2, most, w2_EDF.shape[2]).unbind()
    dh_scratch_NH = x_ND.new_empty(most, w1_EHD.shape[1]) if dh_NH is None else None
    start = 0
    for e, count in enumerate(count_E):
        if count:
            rows, size = slice(start, start + count), _rounded(count, x_ND)
            dy_nD, h_nH, x_nD = (_padded(whole[rows], size) for whole in (dy_ND, h_NH, x_ND))
            a_nF, da_nF = a_scratch_NF[:size], da_scratch_NF[:size]
            dh_nH = _room(dh_NH[rows], size) if dh_scratch_NH is None else dh_scratch_NH[:size]  # type: ignore[index]
            torch.mm(dy_nD, w2_EDF[e], out=da_nF)
            activate_backward(da_nF, h_nH, activation, dh_nH, a_nF)
            _add_of_expert(e, grads, dy_nD, a_nF, dh_nH, x_nD)
            if dh_NH is not None:
                _keep(dh_nH, dh_NH[rows])
            if dx_ND is not None:
                dx_nD = _room(dx_ND[rows], size)
                torch.mm(dh_nH, w1_EHD[e], out=dx_nD)
                _keep(dx_nD, dx_ND[rows])
        start += count
    return dx_ND


def _add_weights_loop(
    dy_ND: Tensor,
    x_ND: Tensor,
    h_NH: Tensor,
    dh_NH: Tensor,
    count_E: list[int],
    grads: list[Tensor | None],
    activation: Activation,
    width: int,
) -> None:
    """What `_backward_loop` leaves out without `grads`."""
    scratch_NF = x_ND.new_empty(_rounded(max(count_E), x_ND), width)
    start = 0
    for e, count in enumerate(count_E):
        if count:
            rows, size = slice(start, start + count), _rounded(count, x_ND)
            dy_nD, h_nH, dh_nH, x_nD = (_padded(whole[rows], size) for whole in (dy_ND, h_NH, dh_NH, x_ND))
            if grads[1] is not None:
                activate(h_nH, activation, scratch_NF[:size])
            _add_of_expert(e, grads, dy_nD, scratch_NF[:size], dh_nH, x_nD)
        start += count


def _add_of_expert(e: int, grads: list[Tensor | None], dy_nD: Tensor, a_nF: Tensor, dh_nH: Tensor, x_nD: Tensor) -> None:
    """Add its rows' part to the gradients of expert e, of those that there are."""
    w1_grad, w2_grad, b1_grad, b2_grad = grads
    for weight_grad, bias_grad, dout, into in ((w2_grad, b2_grad, dy_nD, a_nF), (w1_grad, b1_grad, dh_nH, x_nD)):
        if weight_grad is not None:
            add_outer(weight_grad[e], dout, into)
        if bias_grad is not None:
            add_rows(bias_grad[e], dout)


def _forward_grouped(
    x_ND: Tensor,
    count_E: list[int],
    w1_EHD: Tensor,
    w2_EDF: Tensor,
    b1_EH: Tensor | None,
    b2_ED: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    count, end = _count_and_end(count_E, x_ND.device)
    h_NH = F.grouped_mm(x_ND, w1_EHD.transpose(1, 2), offs=end)
    if b1_EH is not None:
        h_NH.add_(b1_EH.repeat_interleave(count, dim=0, output_size=len(x_ND)))
    a_NF = h_NH.new_empty(len(x_ND), w2_EDF.shape[2])
    activate(h_NH, activation, a_NF)
    y_ND = F.grouped_mm(a_NF, w2_EDF.transpose(1, 2), offs=end)
    if b2_ED is not None:
        y_ND.add_(b2_ED.repeat_interleave(count, dim=0, output_size=len(x_ND)))
    return y_ND, h_NH


def _backward_grouped(
    dy_ND: Tensor,
    x_ND: Tensor,
    h_NH: Tensor,
    count_E: list[int],
    w1_EHD: Tensor,
    w2_EDF: Tensor,
    grads: list[Tensor | None],
    activation: Activation,
    *,
    needs_dx: bool,
    dh_NH: Tensor | None,
) -> Tensor | None:
    _, end = _count_and_end(count_E, x_ND.device)
    da_NF = F.grouped_mm(dy_ND, w2_EDF, offs=end)
    dh_NH, a_NF = torch.empty_like(h_NH) if dh_NH is None else dh_NH, torch.empty_like(da_NF)
    activate_backward(da_NF, h_NH, activation, dh_NH, a_NF)
    _add_grouped(count_E, end, grads, dy_ND, a_NF, dh_NH, x_ND)
    return F.grouped_mm(dh_NH, w1_EHD, offs=end) if needs_dx else None


def _add_weights_grouped(
    dy_ND: Tensor,
    x_ND: Tensor,
    h_NH: Tensor,
    dh_NH: Tensor,
    count_E: list[int],
    grads: list[Tensor | None],
    activation: Activation,
    width: int,
) -> None:
    """What `_backward_grouped` leaves out without `grads`."""
    _, end = _count_and_end(count_E, x_ND.device)
    a_NF = x_ND.new_empty(len(x_ND), width)
    if grads[1] is not None:
        activate(h_NH, activation, a_NF)
    _add_grouped(count_E, end, grads, dy_ND, a_NF, dh_NH, x_ND)


def _add_grouped(
    count_E: list[int], end: Tensor, grads: list[Tensor | None], dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor, x_ND: Tensor
) -> None:
    """Add to those gradients that there are."""
    w1_grad, w2_grad, b1_grad, b2_grad = grads
    for weight_grad, bias_grad, dout, into in ((w2_grad, b2_grad, dy_ND, a_NF), (w1_grad, b1_grad, dh_NH, x_ND)):
        if weight_grad is not None:
            weight_grad.add_(F.grouped_mm(dout.t(), into, offs=end))
        if bias_grad is not None:
            for e, part in enumerate(dout.split(count_E)):
                add_rows(bias_grad[e], part)


def _count_and_end(count_E: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    count = torch.tensor(count_E)
    return count.to(device, non_blocking=True), count.cumsum(0).to(torch.int32).to(device, non_blocking=True)
