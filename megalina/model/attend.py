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

from megalina.blocks.attention import LONGEST_BLOCKED, QUERIES_A_BLOCK, SEQUENCES_A_BLOCK, SHORTEST_BLOCKED


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
    """With heads laid out as [B, G, S*r, d] the queries of a block that share a key head are rows of one matrix as they lie.

    N: key heads of the sequences of a block; n = q * r of its rows."""

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
        groups = k_BSGd.shape[2]
        shared = heads // groups
        q_BGRd, k_BGSd, v_BGSe = _by_group(q_BSHd, groups, scale), _by_group(k_BSGd, groups), _by_group(v_BSGe, groups)
        out_BSHe = q_BSHd.new_empty(batch, length, heads, v_BSGe.shape[-1])
        out_BGSre = _split(out_BSHe, groups)
        all_BHS = None if sink_H is None else q_BSHd.new_empty(batch, heads, length)
        keep = any(ctx.needs_input_grad)
        blocks = list(_blocks(batch, length, document_BS, window))
        weights = []
        for those, first_key, begin, end in blocks:
            rows, keys = slice(begin * shared, end * shared), slice(first_key, end)
            q_Nnd, k_Nld, v_Nle = _part(q_BGRd, those, rows), _part(k_BGSd, those, keys), _part(v_BGSe, those, keys)
            score_Nnl = torch.bmm(q_Nnd, k_Nld.transpose(1, 2))
            score_bGqrl = score_Nnl.view(-1, groups, end - begin, shared, end - first_key)
            future_qq = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            score_bGqrl[..., begin - first_key :].masked_fill_(future_qq[:, None], float("-inf"))
            if window and end - first_key > window:
                left_ql = torch.ones(end - begin, end - first_key, dtype=torch.bool).tril(begin - first_key - window)
                score_bGqrl.masked_fill_(left_ql[:, None], float("-inf"))
            if document_BS is not None:
                other_bql = document_BS[those, begin:end, None] != document_BS[those, None, keys]
                score_bGqrl.masked_fill_(other_bql[:, None, :, None], float("-inf"))
            if sink_H is None or all_BHS is None:
                weight_Nnl = torch.softmax(score_Nnl, dim=-1)
            else:
                sink_Gr = sink_H.view(groups, 1, shared)
                all_bGqr = torch.logaddexp(torch.logsumexp(score_bGqrl, dim=-1), sink_Gr)
                score_bGqrl.sub_(all_bGqr.unsqueeze(-1)).exp_()
                weight_Nnl = score_Nnl
                all_BHS[those, :, begin:end] = all_bGqr.transpose(2, 3).flatten(1, 2)
            out_bGqre = out_BGSre[those, :, begin:end]
            out_bGqre.copy_(torch.bmm(weight_Nnl, v_Nle).view(out_bGqre.shape))
            if keep:
                weights.append(weight_Nnl)
        ctx.blocks, ctx.scale = blocks, scale
        ctx.save_for_backward(q_BSHd, k_BSGd, v_BSGe, sink_H, all_BHS, out_BSHe, *weights)
        return out_BSHe.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHd, k_BSGd, v_BSGe, sink_H, all_BHS, out_BSHe, *weights = ctx.saved_tensors
        groups = k_BSGd.shape[2]
        shared = q_BSHd.shape[2] // groups
        dout_BSHe = dout.view(out_BSHe.shape)
        # the softmax's backward subtracts weight . d weight = out . d out
        inner_BSH1 = torch.linalg.vecdot(dout_BSHe, out_BSHe).unsqueeze(-1)
        inner_BGR1, dout_BGRe = _by_group(inner_BSH1, groups), _by_group(dout_BSHe, groups)
        # each product of scores' gradients with queries or keys wants the scale once
        q_BGRd, k_BGSd = (_by_group(x, groups, ctx.scale) for x in (q_BSHd, k_BSGd))
        v_BGSe = _by_group(v_BSGe, groups)
        dq_BSHd = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype)
        dq_BGSrd = _split(dq_BSHd, groups)
        dk_BGSd, dv_BGSe = torch.zeros_like(k_BGSd), torch.zeros_like(v_BGSe)
        for (those, first_key, begin, end), weight_Nnl in zip(ctx.blocks, weights, strict=True):
            rows, keys = slice(begin * shared, end * shared), slice(first_key, end)
            q_Nnd, dout_Nne, inner_Nn1 = (_part(x, those, rows) for x in (q_BGRd, dout_BGRe, inner_BGR1))
            k_Nld, v_Nle, dk_Nld, dv_Nle = (_part(x, those, keys) for x in (k_BGSd, v_BGSe, dk_BGSd, dv_BGSe))
            dv_Nle.add_(torch.bmm(weight_Nnl.transpose(1, 2), dout_Nne))
            dscore_Nnl = torch.bmm(dout_Nne, v_Nle.transpose(1, 2)).sub_(inner_Nn1).mul_(weight_Nnl)
            dk_Nld.add_(torch.bmm(dscore_Nnl.transpose(1, 2), q_Nnd))
            dq_bGqrd = dq_BGSrd[those, :, begin:end]
            dq_bGqrd.copy_(torch.bmm(dscore_Nnl, k_Nld).view(dq_bGqrd.shape))
        dsink_H = None
        if sink_H is not None:
            dsink_H = of_sinks(dout_BSHe.transpose(1, 2), out_BSHe.transpose(1, 2), sink_H, all_BHS)
        dk_BSGd, dv_BSGe = (x.transpose(1, 2).contiguous() for x in (dk_BGSd, dv_BGSe))
        return dq_BSHd, dk_BSGd, dv_BSGe, dsink_H, None, None, None


def _blocks(batch: int, length: int, document_BS: Tensor | None, window: int) -> Iterator[tuple[slice, int, int, int]]:
    """(sequences, first key, first query, end of both) of each block; earlier keys are of other documents, or outside of all
    windows.  Sequences of documents are by themselves: each sees keys of its own."""
    documents = None if document_BS is None else document_BS.tolist()
    together = SEQUENCES_A_BLOCK if documents is None else 1
    for b in range(0, batch, together):
        for begin in range(0, length, QUERIES_A_BLOCK):
            end = min(begin + QUERIES_A_BLOCK, length)
            first_key = max(0, begin - window + 1) if window else 0
            if documents is not None:
                own = set(documents[b][begin:end])
                first_key = max(first_key, next(i for i, document in enumerate(documents[b]) if document in own))
            yield slice(b, min(b + together, batch)), first_key, begin, end


def _split(x_BSHd: Tensor, groups: int) -> Tensor:
    """A view, [B, G, S, r, d]."""
    batch, length, heads, width = x_BSHd.shape
    return x_BSHd.view(batch, length, groups, heads // groups, width).transpose(1, 2)


def _by_group(x_BSHd: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """A copy times `scale`, [B, G, S*r, d]."""
    x_BGSrd = _split(x_BSHd if x_BSHd.is_contiguous() else x_BSHd.contiguous(), groups)
    out_BGSrd = x_BSHd.new_empty(x_BGSrd.shape)
    if scale == 1.0:
        out_BGSrd.copy_(x_BGSrd)
    else:
        torch.mul(x_BGSrd, scale, out=out_BGSrd)
    return out_BGSrd.flatten(2, 3)


def _part(x_BGRd: Tensor, sequences: slice, rows: slice) -> Tensor:
    """A view, [N, n, d]."""
    return x_BGRd[sequences].view(-1, *x_BGRd.shape[2:])[:, rows]
