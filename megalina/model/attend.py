"""The attention core: causal softmax attention of queries over keys, within documents, within a window, with sinks.

On CUDA, for decoding, and for short and very long sequences it is torch's fused kernel.  On CPU, from `SHORTEST_BLOCKED` tokens
and up to `LONGEST_BLOCKED` keys of a query, it goes through blocks of queries with plain batched GEMMs, which is up to 1.6 times
as fast forward and backward (2.5 times with documents, whose keys outside are skipped, as are those outside of a window), for the
memory of the attention weights: H * S^2 / 2 numbers a sequence.

A sink is a score of its own that joins a head's softmax and gives nothing (gpt-oss; Xiao et al. 2023, arXiv:2309.17453): all
weights are multiplied by exp(L - L'), L and L' being the logarithms of the sums of exponentials without and with it.  Backward is
then the fused kernel's own, which knows of the softmax nothing but L'.

Shapes: B sequences, S queries a sequence, L keys (L >= S: the queries are the last S positions), H query heads, G key heads
(each serves r = H / G query heads in turn), d numbers of a query or key, e of a value; q queries of one block, l keys that it
sees.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.blocks.attention import LONGEST_BLOCKED, QUERIES_A_BLOCK, SHORTEST_BLOCKED


def attend(
    q_BSHd: Tensor,
    k_BLGd: Tensor,
    v_BLGe: Tensor,
    document_BL: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    sink_H: Tensor | None = None,
) -> Tensor:
    """[B, S, H*e].  A query sees keys at its own and earlier positions, of the same document if `document_BL` is given, and with
    a `window` only the last so many, its own among them.  `scale`: of scores, None: d^-1/2; `sink_H`: scores of sinks."""
    factor = q_BSHd.shape[-1] ** -0.5 if scale is None else scale
    num_queries, num_keys = q_BSHd.shape[1], k_BLGd.shape[1]
    if window and num_keys >= num_queries + window:  # of earlier keys that no query sees
        seen = slice(num_keys - num_queries - window + 1, None)
        k_BLGd, v_BLGe = k_BLGd[:, seen], v_BLGe[:, seen]
        document_BL = None if document_BL is None else document_BL[:, seen]
        num_keys = k_BLGd.shape[1]
    window = window if window < num_keys else 0
    on_cpu = q_BSHd.device.type == "cpu"
    if (
        SHORTEST_BLOCKED <= num_queries == num_keys
        and (window or num_keys) <= LONGEST_BLOCKED
        and on_cpu
        and q_BSHd.dtype in (torch.float32, torch.float64)
    ):
        return _AttendInBlocks.apply(q_BSHd, k_BLGd, v_BLGe, sink_H, document_BL, factor, window)
    plain = document_BL is None and not window and num_queries in (1, num_keys)
    mask = None if plain else attention_mask(num_queries, num_keys, document_BL, q_BSHd.device, window)
    if sink_H is not None and not on_cpu:
        return _by_definition(q_BSHd, k_BLGd, v_BLGe, mask, factor, sink_H, causal=plain and num_queries > 1)
    width = v_BLGe.shape[-1]
    if on_cpu and width != q_BSHd.shape[-1]:  # its kernel has one width for all
        q_BSHd, k_BLGd, v_BLGe = of_one_width(q_BSHd, k_BLGd, v_BLGe)
        scale = factor
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BLGd, v_BLGe))
    causal = plain and num_queries > 1
    if sink_H is not None:
        out_BHSe = _AttendWithSinks.apply(q, k, v, sink_H, mask, causal, factor)
    else:
        out_BHSe = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=k_BLGd.shape[2] != q_BSHd.shape[2]
        )
    return out_BHSe.transpose(1, 2)[..., :width].flatten(2)


def attention_mask(num_queries: int, num_keys: int, document_BL: Tensor | None, device: torch.device, window: int = 0) -> Tensor:
    """bool, [S, L] or with documents [B, 1, S, L]: True where the query sees the key."""
    before = num_keys - num_queries
    seen_SL = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(before)
    if window:
        seen_SL = seen_SL.triu(before - window + 1)
    if document_BL is None:
        return seen_SL
    query_BS = document_BL[:, before:]
    return ((query_BS[:, :, None] == document_BL[:, None, :]) & seen_SL).unsqueeze(1)


def of_one_width(*tensors: Tensor) -> Iterator[Tensor]:
    """With zeros behind those that are narrower, which add nothing to scores, and to results only what is cut off again."""
    width = max(x.shape[-1] for x in tensors)
    return (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)


def _by_definition(
    q_BSHd: Tensor, k_BLGd: Tensor, v_BLGe: Tensor, mask: Tensor | None, scale: float, sink_H: Tensor, *, causal: bool
) -> Tensor:
    """With all scores in memory."""
    batch, num_queries, heads, _ = q_BSHd.shape
    if causal:
        mask = attention_mask(num_queries, k_BLGd.shape[1], None, q_BSHd.device)
    k_BHdL, v_BHLe = (x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in (k_BLGd, v_BLGe))
    score_BHSL = (q_BSHd.transpose(1, 2) @ k_BHdL.transpose(2, 3)).mul(scale)
    if mask is not None:
        score_BHSL = score_BHSL.masked_fill(~mask, float("-inf"))
    sink_BHS1 = sink_H[:, None, None].to(score_BHSL.dtype).expand(batch, -1, num_queries, 1)
    wide = torch.promote_types(score_BHSL.dtype, torch.float32)
    weight_BHSL = torch.cat([score_BHSL, sink_BHS1], -1).softmax(-1, dtype=wide)[..., :-1].to(v_BHLe.dtype)
    return (weight_BHSL @ v_BHLe).transpose(1, 2).flatten(2)


class _AttendWithSinks(torch.autograd.Function):
    """On CPU, with its fused kernel.  Heads are before tokens here, and all are of one width."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        added = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        ctx.how = {"dropout_p": 0.0, "is_causal": causal, "attn_mask": added, "scale": scale}
        out_BHSd, sum_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **ctx.how)
        all_BHS = torch.logaddexp(sum_BHS, sink_H.to(sum_BHS.dtype)[:, None])
        out_BHSd = (out_BHSd * (sum_BHS - all_BHS).exp_().unsqueeze(-1)).to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_H, out_BHSd, all_BHS)
        return out_BHSd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BHSd: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_H, out_BHSd, all_BHS = ctx.saved_tensors
        of_qkv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BHSd, q, k, v, out_BHSd, all_BHS, **ctx.how
        )
        return *of_qkv, of_sinks(dout_BHSd, out_BHSd, sink_H, all_BHS), None, None, None


def of_sinks(dout_BHSd: Tensor, out_BHSd: Tensor, sink_H: Tensor, all_BHS: Tensor) -> Tensor:
    """The gradient of sinks' scores: a softmax's backward subtracts weight . d weight = out . d out, and a sink has no more."""
    wide = all_BHS.dtype
    inner_BHS = torch.linalg.vecdot(dout_BHSd.to(wide), out_BHSd.to(wide))
    return ((sink_H.to(wide)[:, None] - all_BHS).exp_() * inner_BHS).sum((0, 2)).neg_().to(sink_H.dtype)


class _AttendInBlocks(torch.autograd.Function):
    """A block's queries of the heads that share a key head are the rows of one matrix, [G, r*q, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSGe: Tensor,
        sink_H: Tensor | None,
        document_BS: Tensor | None,
        scale: float,
        window: int,
    ) -> Tensor:
        batch, length, heads, _ = q_BSHd.shape
        out_BSHe = q_BSHd.new_empty(batch, length, heads, v_BSGe.shape[-1])
        all_BHS = None if sink_H is None else q_BSHd.new_empty(batch, heads, length)
        keep = any(ctx.needs_input_grad)
        blocks = list(_blocks(batch, length, document_BS, window))
        weights = []
        for b, first_key, begin, end in blocks:
            k_Gld, v_Gle = (x[b, first_key:end].transpose(0, 1) for x in (k_BSGd, v_BSGe))
            score_Gnl = torch.bmm(_group(q_BSHd[b, begin:end], len(k_Gld)).mul_(scale), k_Gld.transpose(1, 2))
            score_Hql = score_Gnl.view(heads, end - begin, end - first_key)
            future_qq = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            score_Hql[:, :, begin - first_key :].masked_fill_(future_qq, float("-inf"))
            if window and end - first_key > window:
                left_ql = torch.ones(end - begin, end - first_key, dtype=torch.bool).tril(begin - first_key - window)
                score_Hql.masked_fill_(left_ql, float("-inf"))
            if document_BS is not None:
                score_Hql.masked_fill_(document_BS[b, begin:end, None] != document_BS[b, first_key:end], float("-inf"))
            if sink_H is None or all_BHS is None:
                weight_Gnl = torch.softmax(score_Gnl, dim=-1)
            else:
                all_Hq = torch.logaddexp(torch.logsumexp(score_Hql, dim=-1), sink_H[:, None])
                score_Hql.sub_(all_Hq.unsqueeze(-1)).exp_()
                weight_Gnl, all_BHS[b, :, begin:end] = score_Gnl, all_Hq
            _ungroup(torch.bmm(weight_Gnl, v_Gle), out_BSHe[b, begin:end])
            if keep:
                weights.append(weight_Gnl)
        ctx.blocks, ctx.scale = blocks, scale
        ctx.save_for_backward(q_BSHd, k_BSGd, v_BSGe, sink_H, all_BHS, out_BSHe, *weights)
        return out_BSHe.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHd, k_BSGd, v_BSGe, sink_H, all_BHS, out_BSHe, *weights = ctx.saved_tensors
        scale, num_groups = ctx.scale, k_BSGd.shape[2]
        dout_BSHe = dout.view(out_BSHe.shape)
        dq_BSHd = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype)
        dk_BSGd, dv_BSGe = (torch.zeros(x.shape, dtype=x.dtype) for x in (k_BSGd, v_BSGe))
        # the softmax's backward subtracts weight . d weight = out . d out
        inner_BSH1 = torch.linalg.vecdot(dout_BSHe, out_BSHe).unsqueeze(-1)
        for (b, first_key, begin, end), weight_Gnl in zip(ctx.blocks, weights, strict=True):
            k_Gld, v_Gle, dk_Gld, dv_Gle = (x[b, first_key:end].transpose(0, 1) for x in (k_BSGd, v_BSGe, dk_BSGd, dv_BSGe))
            q_Gnd, dout_Gne, inner_Gn1 = (_group(x[b, begin:end], num_groups) for x in (q_BSHd, dout_BSHe, inner_BSH1))
            dv_Gle.add_(torch.bmm(weight_Gnl.transpose(1, 2), dout_Gne))
            dscore_Gnl = torch.bmm(dout_Gne, v_Gle.transpose(1, 2)).sub_(inner_Gn1).mul_(weight_Gnl)
            dk_Gld.add_(torch.bmm(dscore_Gnl.transpose(1, 2), q_Gnd), alpha=scale)
            _ungroup(torch.bmm(dscore_Gnl, k_Gld).mul_(scale), dq_BSHd[b, begin:end])
        dsink_H = None
        if sink_H is not None:
            dsink_H = of_sinks(dout_BSHe.transpose(1, 2), out_BSHe.transpose(1, 2), sink_H, all_BHS)
        return dq_BSHd, dk_BSGd, dv_BSGe, dsink_H, None, None, None


def _blocks(batch: int, length: int, document_BS: Tensor | None, window: int) -> Iterator[tuple[int, int, int, int]]:
    """(sequence, first key, first query, end of both) of each block; earlier keys are of other documents, or outside of all
    windows."""
    documents = None if document_BS is None else document_BS.tolist()
    for b in range(batch):
        for begin in range(0, length, QUERIES_A_BLOCK):
            end = min(begin + QUERIES_A_BLOCK, length)
            first_key = max(0, begin - window + 1) if window else 0
            if documents is not None:
                own = set(documents[b][begin:end])
                first_key = max(first_key, next(i for i, document in enumerate(documents[b]) if document in own))
            yield b, first_key, begin, end


def _group(x_qHd: Tensor, num_groups: int) -> Tensor:
    """[q, H, d] -> a new [G, r*q, d]."""
    queries, heads, head_dim = x_qHd.shape
    x_Grqd = x_qHd.reshape(queries, num_groups, heads // num_groups, head_dim).permute(1, 2, 0, 3)
    return x_Grqd.clone(memory_format=torch.contiguous_format).view(num_groups, -1, head_dim)


def _ungroup(x_Gnd: Tensor, out_qHd: Tensor) -> None:
    queries, heads, head_dim = out_qHd.shape
    out_qHd.copy_(x_Gnd.view(heads, queries, head_dim).transpose(0, 1))
