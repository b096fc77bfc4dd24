"""The attention core of a piece of a sequence: S queries, the last of L tokens, over the keys of them all.

On CPU a few queries at a time go through torch's fused kernel: no mask is larger than theirs, and what is kept for backward is
the result and a number for each query and head.  Letters as in `megalina/model/attend.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from megalina.blocks.context import QUERIES_A_TURN
from megalina.model.attend import attend, of_one_width, of_sinks


def attend_part(
    q_BSHd: Tensor,
    k_BLGd: Tensor,
    v_BLGe: Tensor,
    document_BL: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    sink_H: Tensor | None = None,
) -> Tensor:
    """As `attend`, for fewer queries than keys, and many of both."""
    factor = q_BSHd.shape[-1] ** -0.5 if scale is None else scale
    if q_BSHd.device.type != "cpu":
        if document_BL is not None or window or sink_H is not None:
            return attend(q_BSHd, k_BLGd, v_BLGe, document_BL, scale=scale, window=window, sink_H=sink_H)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BLGd, v_BLGe))
        mask, grouped = causal_lower_right(q.shape[2], k.shape[2]), q.shape[1] != k.shape[1]
        out_BHSe = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=factor, enable_gqa=grouped)
        return out_BHSe.transpose(1, 2).flatten(2)
    width = v_BLGe.shape[-1]
    if width != q_BSHd.shape[-1]:
        q_BSHd, k_BLGd, v_BLGe = of_one_width(q_BSHd, k_BLGd, v_BLGe)
    out_BSHd: Tensor = _AttendInTurns.apply(q_BSHd, k_BLGd, v_BLGe, sink_H, document_BL, factor, window)
    return out_BSHd[..., :width].flatten(2)


class _AttendInTurns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: Tensor,
        k_BLGd: Tensor,
        v_BLGd: Tensor,
        sink_H: Tensor | None,
        document_BL: Tensor | None,
        scale: float,
        window: int,
    ) -> Tensor:
        out_BSHd = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype)
        sums = []  # logarithms of sums of exponentials, of each turn [B, H, q]
        for begin, end, first_key, last_key, added in _turns(q_BSHd, k_BLGd, document_BL, window):
            q, k, v = (x.transpose(1, 2) for x in (q_BSHd[:, begin:end], *_keys(first_key, last_key, k_BLGd, v_BLGd)))
            out_BHqd, sum_BHq = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, dropout_p=0.0, is_causal=False, attn_mask=added, scale=scale
            )
            if sink_H is not None:
                all_BHq = torch.logaddexp(sum_BHq, sink_H.to(sum_BHq.dtype)[:, None])
                out_BHqd, sum_BHq = out_BHqd * (sum_BHq - all_BHq).exp_().unsqueeze(-1), all_BHq
            out_BSHd[:, begin:end] = out_BHqd.transpose(1, 2)
            sums.append(sum_BHq)
        ctx.scale, ctx.window = scale, window
        ctx.save_for_backward(q_BSHd, k_BLGd, v_BLGd, sink_H, document_BL, out_BSHd, *sums)
        return out_BSHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHd: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHd, k_BLGd, v_BLGd, sink_H, document_BL, out_BSHd, *sums = ctx.saved_tensors
        dq_BSHd = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype)
        dk_BLGd, dv_BLGd = (torch.zeros(x.shape, dtype=x.dtype) for x in (k_BLGd, v_BLGd))
        turns = _turns(q_BSHd, k_BLGd, document_BL, ctx.window)
        for (begin, end, first_key, last_key, added), sum_BHq in zip(turns, sums, strict=True):
            q, dout, out = (x[:, begin:end].transpose(1, 2) for x in (q_BSHd, dout_BSHd, out_BSHd))
            k, v = (x.transpose(1, 2) for x in _keys(first_key, last_key, k_BLGd, v_BLGd))
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, out, sum_BHq, dropout_p=0.0, is_causal=False, attn_mask=added, scale=ctx.scale
            )
            dq_BSHd[:, begin:end] = dq.transpose(1, 2)
            dk_BLGd[:, first_key:last_key] += dk.transpose(1, 2)
            dv_BLGd[:, first_key:last_key] += dv.transpose(1, 2)
        dsink_H = None
        if sink_H is not None:
            dsink_H = of_sinks(dout_BSHd.transpose(1, 2), out_BSHd.transpose(1, 2), sink_H, torch.cat(sums, dim=2))
        return dq_BSHd, dk_BLGd, dv_BLGd, dsink_H, None, None, None


def _turns(
    q_BSHd: Tensor, k_BLGd: Tensor, document_BL: Tensor | None, window: int
) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Of some queries the first and the end, of the keys that they may see likewise, and what is added to their scores: [q, l],
    with documents [B, 1, q, l], -inf where a query does not see a key."""
    num_queries, before = q_BSHd.shape[1], k_BLGd.shape[1] - q_BSHd.shape[1]
    for begin in range(0, num_queries, QUERIES_A_TURN):
        end = min(begin + QUERIES_A_TURN, num_queries)
        first_key, last_key = max(0, before + begin - window + 1) if window else 0, before + end
        own = before + begin - first_key  # of the first query, among these keys
        seen = torch.ones(end - begin, last_key - first_key, dtype=torch.bool).tril_(own)
        if window:
            seen.triu_(own - window + 1)
        if document_BL is not None:
            query_Bq, key_Bl = document_BL[:, before + begin : before + end], document_BL[:, first_key:last_key]
            seen = ((query_Bq[:, :, None] == key_Bl[:, None]) & seen).unsqueeze(1)
        added = torch.zeros(seen.shape, dtype=q_BSHd.dtype).masked_fill_(~seen, float("-inf"))
        yield begin, end, first_key, last_key, added


def _keys(first: int, last: int, *tensors: Tensor) -> Iterator[Tensor]:
    return (x[:, first:last] for x in tensors)
