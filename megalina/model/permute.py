"""The order of rows: which token each row of the experts' input comes from, and the way back.

Backward passes are gathers in the opposite direction: no atomic adds, so the result does not depend on timing.
Shapes: T tokens, K assignments a token, N rows (assignments to somebody), D width, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Rows sorted by expert, and by token within an expert."""

    token_N: Tensor  # int64, the token of each row
    row_TK: Tensor  # int64, the row of each assignment; N where the assignment is to nobody
    slot_N: Tensor  # int64, the assignment of each row: an index into the flat [T, K]
    count_E: Tensor  # int64, rows of each expert
    expert_E: Tensor | None = (
        None  # int64, where experts lie in another order: the expert in each place; rows are sorted by place
    )
    new_way: Callable[[], Any] | None = None  # of rows that ranks pass on in their nodes: makes a `NodeWay`

    @property
    def experts(self) -> Tensor:
        """int64 [E]: the expert in each place."""
        return torch.arange(len(self.count_E), device=self.count_E.device) if self.expert_E is None else self.expert_E


@dataclass(frozen=True, slots=True)
class Places:
    """Where experts lie, if not expert i in place i."""

    expert_E: Tensor  # int64, the expert in each place
    place_E: Tensor  # int64 [E + 1], the place of each expert; nobody, E, stays nobody


def places_of(order: Sequence[int], device: torch.device | None = None) -> Places:
    expert_E = torch.tensor(order, device=device)
    nobody = expert_E.new_tensor([len(order)])
    return Places(expert_E, torch.cat([expert_E.argsort(), nobody]))


def row_order(expert_TK: Tensor, num_experts: int, places: Places | None = None) -> RowOrder:
    """Order for assignments `expert_TK`, int64, where `num_experts` means nobody: dropped, or padding."""
    if places is not None:
        expert_TK = places.place_E[expert_TK]
    flat = expert_TK.reshape(-1)
    count = torch.bincount(flat, minlength=num_experts + 1)
    sorted_slot = torch.sort(flat, stable=True).indices
    num_rows = flat.numel() - int(count[num_experts])
    row = torch.empty_like(flat).scatter_(0, sorted_slot, torch.arange(flat.numel(), device=flat.device))
    slot_N = sorted_slot[:num_rows]
    return RowOrder(
        token_N=slot_N // expert_TK.shape[1],
        row_TK=row.clamp_(max=num_rows).view(expert_TK.shape),
        slot_N=slot_N,
        count_E=count[:num_experts],
        expert_E=None if places is None else places.expert_E,
    )


def permute(x_TD: Tensor, order: RowOrder) -> Tensor:
    """The rows, [N, D]: row n is a copy of token `order.token_N[n]`."""
    return _Permute.apply(x_TD, order)


def unpermute(residual_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, order: RowOrder) -> Tensor:
    """residual + sum over k of weight[t, k] * rows[row[t, k]]; assignments to nobody add nothing.

    `weight_TK` may be of higher precision than the rows: then the sum is taken in it.
    """
    return _Unpermute.apply(residual_TD, rows_ND, weight_TK, order)


def regroup_index(count_RE: list[list[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Index and inverse that bring rows sorted by (source rank, expert) into the order (expert, source rank), and back.

    `count_RE`: rows from each source rank for each local expert.  `rows[index]` is sorted by expert; `[inverse]` undoes it.
    """
    count = torch.tensor(count_RE, dtype=torch.int64)
    num_ranks, num_experts = count.shape
    begin_RE = (count.flatten().cumsum(0) - count.flatten()).view(num_ranks, num_experts)
    count_ER, begin_ER = count.t().flatten(), begin_RE.t().flatten()
    end_ER = count_ER.cumsum(0)
    total = int(end_ER[-1]) if end_ER.numel() else 0
    # row i of the result is row (i - start of its block there) of its block here
    index = torch.arange(total) + (begin_ER - (end_ER - count_ER)).repeat_interleave(count_ER)
    inverse = torch.empty_like(index).scatter_(0, index, torch.arange(total))
    return index.to(device), inverse.to(device)


def reorder(rows_ND: Tensor, index_N: Tensor, inverse_N: Tensor) -> Tensor:
    """rows[index]; backward gathers with the inverse."""
    return _Reorder.apply(rows_ND, index_N, inverse_N)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return x_TD.index_select(0, order.token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_ND: Tensor) -> tuple[Tensor, None]:
        return sum_rows(drows_ND, None, ctx.order.row_TK), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_TK)
        ctx.order = order
        return sum_rows(rows_ND, weight_TK, order.row_TK).add_(residual_TD).to(residual_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows_ND, weight_TK = ctx.saved_tensors
        order: RowOrder = ctx.order
        drows_ND = dweight_TK = None
        dout_ND = dout_TD.index_select(0, order.token_N)
        if ctx.needs_input_grad[2]:
            dweight_N = torch.linalg.vecdot(dout_ND.to(weight_TK.dtype), rows_ND.to(weight_TK.dtype))
            dweight_TK = torch.zeros_like(weight_TK, memory_format=torch.contiguous_format)
            dweight_TK.view(-1).scatter_(0, order.slot_N, dweight_N)
        if ctx.needs_input_grad[1]:
            weight_N1 = weight_TK.reshape(-1).index_select(0, order.slot_N).unsqueeze(1)
            if dout_ND.dtype == weight_TK.dtype == rows_ND.dtype:
                drows_ND = dout_ND.mul_(weight_N1)
            else:
                drows_ND = (dout_ND * weight_N1).to(rows_ND.dtype)
        return dout_TD if ctx.needs_input_grad[0] else None, drows_ND, dweight_TK, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, index_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.inverse_N = inverse_N
        return rows_ND.index_select(0, index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor, None, None]:
        return dout_ND.index_select(0, ctx.inverse_N), None, None


def sum_rows(rows_ND: Tensor, weight_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """[T, D]: the (weighted) sum of each token's rows, in the wider of the two types (rows alone: at least float32 inside)."""
    num_rows, width = rows_ND.shape
    if num_rows == 0:
        dtype = rows_ND.dtype if weight_TK is None else torch.promote_types(rows_ND.dtype, weight_TK.dtype)
        return rows_ND.new_zeros(row_TK.shape[0], width, dtype=dtype)
    if num_rows < row_TK.numel():
        # an assignment to nobody reads the last row with weight zero
        somebody_TK = row_TK < num_rows
        weight_TK = somebody_TK.to(rows_ND.dtype) if weight_TK is None else weight_TK * somebody_TK
        row_TK = row_TK.clamp(max=num_rows - 1)
    if weight_TK is None or weight_TK.dtype == rows_ND.dtype:
        # reads K rows and writes their sum, in one pass
        return F.embedding_bag(row_TK, rows_ND, mode="sum", per_sample_weights=weight_TK)
    out_TD = rows_ND.index_select(0, row_TK[:, 0]) * weight_TK[:, :1]
    for k in range(1, row_TK.shape[1]):
        out_TD.addcmul_(rows_ND.index_select(0, row_TK[:, k]).to(out_TD.dtype), weight_TK[:, k : k + 1])
    return out_TD
