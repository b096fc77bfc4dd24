"""A mixture of experts whose tokens travel once to each rank that has experts of theirs, in torch.

A packed row is the token, then its weights for the experts of the rank that it goes to, -inf where it didn't choose one.

Shapes: T own tokens, D model width, N rows (token and expert), K experts a token, U packed rows (token and rank), e experts of a
rank, C columns of a packed row, k most experts of a token on one rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.batch import Batch
from megalina.model.dispatcher import Counts
from megalina.model.late_gradients import Later
from megalina.model.moe import MoE
from megalina.model.permute import RowOrder, permute, row_order, unpermute
from megalina.model.weight_columns import NOT_CHOSEN, columns_of, weights_of


class OnceMoE(MoE):
    # instructions
    def pack(self, rows_ND: Tensor, weight_TK: Tensor, order: RowOrder) -> tuple[Tensor, RowOrder]:
        """Rows in the order of experts -> packed rows in the order of ranks, and that order."""
        there = self._experts_there
        way, source_U, slot_TK = pack_order(order, there)
        return _Pack.apply(rows_ND, weight_TK, source_U, slot_TK, there), way

    def experts(self, chunk: tuple[int, int], got_UC: Tensor, counts: Counts, *, later: Later | None = None) -> Tensor:
        """Packed rows -> the weighted sum [U, D] of each one's experts here."""
        x_UD, weight_Ue = _Unpack.apply(got_UC, self.block.model.d_model, self._weight_dtype)
        weight_Uk, order = chosen(weight_Ue, self._most_here)
        y_ND = self.holder.experts(permute(x_UD, order), order.count_E.tolist(), later)
        return unpermute(torch.zeros_like(x_UD), y_ND, weight_Uk, order)

    def mix(self, h_TD: Tensor, back_UD: Tensor, *rest: Any) -> Tensor:
        shared_TD, way, batch = rest if len(rest) == 3 else (None, *rest)
        return self._mixed(h_TD, back_UD, shared_TD, way, batch)

    # of which they are made
    @property
    def _experts_here(self) -> int:
        return len(self.holder.experts.w1)

    @property
    def _experts_there(self) -> int:
        """Where a row goes."""
        return self._experts_here

    @property
    def _most_here(self) -> int:
        """Experts here that a token may have chosen."""
        here = self._experts_here
        return here if self.block.kind.experts_choose else min(self.block.router.top_k, here)

    @property
    def _weight_dtype(self) -> torch.dtype:
        return torch.promote_types(self.holder.experts.w1.dtype, torch.float32)

    def _mixed(self, h_TD: Tensor, back_UD: Tensor, shared_TD: Tensor | None, way: RowOrder, batch: Batch) -> Tensor:
        ones_TK = torch.ones(way.row_TK.shape, dtype=self._weight_dtype, device=h_TD.device)
        return self.mixed(h_TD, back_UD, ones_TK, shared_TD, way, batch, self.share.own(batch))


def pack_order(order: RowOrder, here: int) -> tuple[RowOrder, Tensor, Tensor]:
    """Of rows sorted by expert, `here` experts on each rank: the order of packed rows, sorted by rank and then by token; the row
    that has each one's token, int64 [U]; where each choice's weight is in [U + 1, e], int64 [T, K], in row U for nobody."""
    experts, num_rows = len(order.count_E), len(order.token_N)
    numbers = torch.arange(experts, device=order.row_TK.device)
    place_N = numbers.repeat_interleave(order.count_E, output_size=num_rows)
    place_TK = torch.cat([place_N, place_N.new_full((1,), experts)])[order.row_TK]
    rank_TK = place_TK // here
    choices = rank_TK.shape[1]
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    first_TK = (same_TKK * torch.arange(choices, 0, -1, device=rank_TK.device)).argmax(2)  # the first choice on the same rank
    is_first_TK = first_TK == torch.arange(choices, device=rank_TK.device)
    nobody = experts // here
    way = row_order(rank_TK.where(is_first_TK, nobody), nobody)
    row_TK = way.row_TK.gather(1, first_TK)
    slot_TK = row_TK * here + place_TK % here
    return way, order.row_TK.reshape(-1)[way.slot_N], slot_TK


def chosen(weight_Ue: Tensor, most: int) -> tuple[Tensor, RowOrder]:
    """The weights [U, k] of those that were chosen, and the order of their rows."""
    is_chosen_Ue = weight_Ue.detach() != NOT_CHOSEN
    weight_Ue = weight_Ue.where(is_chosen_Ue, 0.0)
    experts = weight_Ue.shape[1]
    numbers_Ue = torch.arange(experts, device=weight_Ue.device).expand_as(weight_Ue)
    if most == experts:
        return weight_Ue, row_order(numbers_Ue.where(is_chosen_Ue, experts), experts)
    expert_Uk = is_chosen_Ue.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    is_chosen_Uk = is_chosen_Ue.gather(1, expert_Uk)
    return weight_Ue.gather(1, expert_Uk), row_order(expert_Uk.where(is_chosen_Uk, experts), experts)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_TK: Tensor, source_U: Tensor, slot_TK: Tensor, here: int) -> Tensor:
        ctx.source_U, ctx.slot_TK, ctx.here, ctx.shape, ctx.dtype = source_U, slot_TK, here, rows_ND.shape, weight_TK.dtype
        packed = len(source_U)
        weight = weight_TK.new_full(((packed + 1) * here,), NOT_CHOSEN)
        weight.scatter_(0, slot_TK.reshape(-1).clamp(max=packed * here), weight_TK.reshape(-1))
        weight_Ue = weight[: packed * here].view(packed, here)
        return torch.cat([rows_ND.index_select(0, source_U), columns_of(weight_Ue, rows_ND.dtype)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsent_UC: Tensor) -> tuple[Tensor | None, ...]:
        rows, width = ctx.shape
        packed, here = len(ctx.source_U), ctx.here
        drows_ND = dweight_TK = None
        if ctx.needs_input_grad[0]:
            drows_ND = dsent_UC.new_zeros(rows, width).index_copy_(0, ctx.source_U, dsent_UC[:, :width])
        if ctx.needs_input_grad[1]:
            dweight_Ue = weights_of(dsent_UC[:, width:], ctx.dtype)
            padded = torch.cat([dweight_Ue.reshape(-1), dweight_Ue.new_zeros(1)])
            dweight_TK = padded[ctx.slot_TK.clamp(max=packed * here)]
        return drows_ND, dweight_TK, None, None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, got_UC: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.dtype = got_UC.dtype
        return got_UC[:, :width].contiguous(), weights_of(got_UC[:, width:], dtype).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_UD: Tensor, dweight_Ue: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat([dx_UD, columns_of(dweight_Ue, ctx.dtype)], 1), None, None
