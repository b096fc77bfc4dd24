"""The attention core: causal softmax attention of queries over keys, within documents.

On CUDA, for decoding, and for short and very long sequences it is torch's fused kernel.  On CPU, from `SHORTEST_BLOCKED` to
`LONGEST_BLOCKED` tokens, it goes through blocks of queries with plain batched GEMMs, which is up to 1.6 times as fast forward and
backward (2.5 times with documents, whose keys outside are skipped), for the memory of the attention weights: H * S^2 / 2 numbers
a sequence.

Shapes: B sequences, S queries a sequence, L keys (L >= S: the queries are the last S positions), H query heads, G key heads
(each serves r = H / G query heads in turn), d numbers a head; q queries of one block, l keys that it sees.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.blocks.attention import LONGEST_BLOCKED, QUERIES_A_BLOCK, SHORTEST_BLOCKED


def attend(q_BSHd: Tensor, k_BLGd: Tensor, v_BLGd: Tensor, document_BL: Tensor | None = None) -> Tensor:
    """[B, S, H*d].  A query sees keys at its own and earlier positions, of the same document if `document_BL` is given."""
    batch, num_queries, heads, head_dim = q_BSHd.shape
    num_keys = k_BLGd.shape[1]
    if (
        SHORTEST_BLOCKED <= num_queries == num_keys <= LONGEST_BLOCKED
        and q_BSHd.device.type == "cpu"
        and q_BSHd.dtype in (torch.float32, torch.float64)
    ):
        return _AttendInBlocks.apply(q_BSHd, k_BLGd, v_BLGd, document_BL)
    plain = document_BL is None and (num_queries == num_keys or num_queries == 1)
    out_BHSd = F.scaled_dot_product_attention(
        q_BSHd.transpose(1, 2),
        k_BLGd.transpose(1, 2),
        v_BLGd.transpose(1, 2),
        attn_mask=None if plain else attention_mask(num_queries, num_keys, document_BL, q_BSHd.device),
        is_causal=plain and num_queries > 1,
        enable_gqa=k_BLGd.shape[2] != heads,
    )
    return out_BHSd.transpose(1, 2).reshape(batch, num_queries, heads * head_dim)


def attention_mask(num_queries: int, num_keys: int, document_BL: Tensor | None, device: torch.device) -> Tensor:
    """bool, [S, L] or with documents [B, 1, S, L]: True where the query sees the key."""
    causal_SL = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    if document_BL is None:
        return causal_SL
    query_BS = document_BL[:, num_keys - num_queries :]
    return ((query_BS[:, :, None] == document_BL[:, None, :]) & causal_SL).unsqueeze(1)


class _AttendInBlocks(torch.autograd.Function):
    """A block's queries of the heads that share a key head are the rows of one matrix, [G, r*q, d]."""

    @staticmethod
    def forward(ctx: Any, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, document_BS: Tensor | None) -> Tensor:
        out_BSHd = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype)
        keep = any(ctx.needs_input_grad)
        blocks = list(_blocks(q_BSHd.shape[0], q_BSHd.shape[1], document_BS))
        weights = []
        for b, first_key, begin, end in blocks:
            k_Gld, v_Gld = (x[b, first_key:end].transpose(0, 1) for x in (k_BSGd, v_BSGd))
            score_Gnl = torch.bmm(_group(q_BSHd[b, begin:end], len(k_Gld)).mul_(q_BSHd.shape[-1] ** -0.5), k_Gld.transpose(1, 2))
            score_Hql = score_Gnl.view(q_BSHd.shape[2], end - begin, end - first_key)
            future_qq = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            score_Hql[:, :, begin - first_key :].masked_fill_(future_qq, float("-inf"))
            if document_BS is not None:
                score_Hql.masked_fill_(document_BS[b, begin:end, None] != document_BS[b, first_key:end], float("-inf"))
            weight_Gnl = torch.softmax(score_Gnl, dim=-1)
            _ungroup(torch.bmm(weight_Gnl, v_Gld), out_BSHd[b, begin:end])
            if keep:
                weights.append(weight_Gnl)
        ctx.blocks = blocks
        ctx.save_for_backward(q_BSHd, k_BSGd, v_BSGd, out_BSHd, *weights)
        return out_BSHd.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BSHd, k_BSGd, v_BSGd, out_BSHd, *weights = ctx.saved_tensors
        scale = q_BSHd.shape[-1] ** -0.5
        num_groups = k_BSGd.shape[2]
        dout_BSHd = dout.view(q_BSHd.shape)
        dq_BSHd = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype)
        dk_BSGd, dv_BSGd = (torch.zeros(k_BSGd.shape, dtype=k_BSGd.dtype) for _ in range(2))
        # the softmax's backward subtracts weight . d weight = out . d out
        inner_BSH1 = torch.linalg.vecdot(dout_BSHd, out_BSHd).unsqueeze(-1)
        for (b, first_key, begin, end), weight_Gnl in zip(ctx.blocks, weights, strict=True):
            k_Gld, v_Gld, dk_Gld, dv_Gld = (x[b, first_key:end].transpose(0, 1) for x in (k_BSGd, v_BSGd, dk_BSGd, dv_BSGd))
            q_Gnd, dout_Gnd, inner_Gn1 = (_group(x[b, begin:end], num_groups) for x in (q_BSHd, dout_BSHd, inner_BSH1))
            dv_Gld.add_(torch.bmm(weight_Gnl.transpose(1, 2), dout_Gnd))
            dscore_Gnl = torch.bmm(dout_Gnd, v_Gld.transpose(1, 2)).sub_(inner_Gn1).mul_(weight_Gnl)
            dk_Gld.add_(torch.bmm(dscore_Gnl.transpose(1, 2), q_Gnd), alpha=scale)
            _ungroup(torch.bmm(dscore_Gnl, k_Gld).mul_(scale), dq_BSHd[b, begin:end])
        return dq_BSHd, dk_BSGd, dv_BSGd, None


def _blocks(batch: int, length: int, document_BS: Tensor | None) -> Iterator[tuple[int, int, int, int]]:
    """(sequence, first key, first query, end of both) of each block; earlier keys are of other documents."""
    documents = None if document_BS is None else document_BS.tolist()
    for b in range(batch):
        for begin in range(0, length, QUERIES_A_BLOCK):
            end = min(begin + QUERIES_A_BLOCK, length)
            first_key = 0
            if documents is not None:
                own = set(documents[b][begin:end])
                first_key = next(i for i, document in enumerate(documents[b]) if document in own)
            yield b, first_key, begin, end


def _group(x_qHd: Tensor, num_groups: int) -> Tensor:
    """[q, H, d] -> a new [G, r*q, d]."""
    queries, heads, head_dim = x_qHd.shape
    x_Grqd = x_qHd.reshape(queries, num_groups, heads // num_groups, head_dim).permute(1, 2, 0, 3)
    return x_Grqd.clone(memory_format=torch.contiguous_format).view(num_groups, -1, head_dim)


def _ungroup(x_Gnd: Tensor, out_qHd: Tensor) -> None:
    queries, heads, head_dim = out_qHd.shape
    out_qHd.copy_(x_Gnd.view(heads, queries, head_dim).transpose(0, 1))
