"""Attention where each sequence is cut over the ranks of context parallelism, in torch.

`all_gather`: a rank gets the keys and values of all tokens (what a kind of attention makes them of, if that is less) and attends
with the queries of its own tokens.  `all_to_all`: ranks exchange heads for tokens (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv:2309.14509), attend with their heads over whole sequences, and exchange back.  Either way a token's
place and document are those in its whole sequence, so masks are those of one process.

Shapes: B sequences, S tokens a sequence here, L = C x S tokens a sequence, C ranks, T = B x S, N = C x T, D width; H query heads,
G key heads, d numbers of a query or key, e of a value, y of what keys and values are made of, X = H x e.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.batch import Batch
from megalina.model.attend import attend, of_one_width, of_sinks
from megalina.model.attend_part import Seen, part_backward, part_forward
from megalina.model.largest_logits import largest_logits
from megalina.model.late_gradients import Later
from megalina.zigzag import by_rank, in_order


class HeadsInContext(Protocol):
    """What a kind of attention gives."""

    scale: float | None  # of scores; None: d^-1/2
    window: int  # 0: none
    sinks: Tensor | None  # [H]

    def queries(self, n_TD: Tensor, batch: Batch, later: Later | None) -> Tensor:
        """[B, S, H, d], turned by their positions."""
        ...

    def compact_keys(self, n_TD: Tensor, batch: Batch, later: Later | None) -> Tensor:
        """[B, S, y]: what keys, turned by their positions, and values are made of."""
        ...

    def keys_and_values(self, kv_BLy: Tensor, later: Later | None) -> tuple[Tensor, Tensor]:
        """[B, L, G, d] and [B, L, G, e]."""
        ...


def attend_gathered(
    heads: HeadsInContext,
    q_TX: Tensor,
    kv_Ny: Tensor,
    batch: Batch,
    ends: Sequence[int],
    *,
    later: Later | None,
    logits: list[Tensor] | None,
) -> Tensor:
    """What the heads give of this rank's tokens, [T, X].  `kv_Ny`: of all ranks' tokens, rank after rank; `ends`: where in their
    sequences this rank's pieces end.  `logits` gets the largest of each group of heads, [G]."""
    q_BSx = q_TX.view(*batch.tokens_BS.shape, -1)
    out: Tensor = _AttendGathered.apply(q_BSx, kv_Ny, heads.sinks, heads, batch, ends, later, logits)
    return out.flatten(0, 1)


class _AttendGathered(torch.autograd.Function):
    """Keys and values of whole sequences are made anew in backward: what is kept of them is what was gathered."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSx: Tensor,
        kv_Ny: Tensor,
        sink_H: Tensor | None,
        heads: HeadsInContext,
        batch: Batch,
        ends: Sequence[int],
        later: Later | None,
        logits: list[Tensor] | None,
    ) -> Tensor:
        kv_BLy = in_order(kv_Ny, batch.contexts, len(q_BSx))[:, : max(ends)]
        k_BLGd, v_BLGe = heads.keys_and_values(kv_BLy, None)
        q_BSHd, width = q_BSx.unflatten(2, (-1, k_BLGd.shape[3])), v_BLGe.shape[3]
        seen = Seen(_scale(heads, q_BSHd), heads.window, sink_H)
        ctx.pieces = list(zip(_halves(q_BSHd.shape[1]), ends, strict=True))
        document_BL, out, sums = batch.uncut.document_BS, q_BSHd.new_empty(*q_BSHd.shape[:3], width), []
        for half, end in ctx.pieces:
            q, k, v, document = q_BSHd[:, half], k_BLGd[:, :end], v_BLGe[:, :end], _until(end, document_BL)
            if logits is not None:
                logits.append(largest_logits(q, k, document, scale=heads.scale, window=heads.window))
            if q.is_cpu:
                q, k, v = of_one_width(q, k, v)
                out_BPHd, sum_BHP = part_forward(q, k, v, document, seen)
                sums.append(sum_BHP)
            else:
                out_BPHd = _by_torch(q, k, v, document, seen)
            out[:, half] = out_BPHd[..., :width]
        ctx.heads, ctx.batch, ctx.seen, ctx.later = heads, batch, replace(seen, sink_H=None), later
        ctx.save_for_backward(q_BSHd, kv_Ny, sink_H, out, *sums)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSx: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHd, kv_Ny, sink_H, out_BSHe, *sums = ctx.saved_tensors
        batch, last, document_BL = ctx.batch, max(end for _, end in ctx.pieces), ctx.batch.uncut.document_BS
        dout_BSHe, dsink_H, seen = dout_BSx.view_as(out_BSHe), None, replace(ctx.seen, sink_H=sink_H)
        whole_BLy = in_order(kv_Ny, batch.contexts, len(q_BSHd))
        kv_BLy = whole_BLy[:, :last].detach().requires_grad_()
        with torch.enable_grad():
            made = ctx.heads.keys_and_values(kv_BLy, ctx.later)
        if q_BSHd.is_cpu:
            dq_BSHd, dmade = _piece_by_piece(ctx.pieces, made, document_BL, seen, q_BSHd, dout_BSHe, out_BSHe, sums)
            if sink_H is not None:
                dsink_H = of_sinks(dout_BSHe.transpose(1, 2), out_BSHe.transpose(1, 2), sink_H, torch.cat(sums, dim=2))
        else:
            dq_BSHd, dmade, dsink_H = _again(ctx.pieces, made, document_BL, seen, q_BSHd, dout_BSHe)
        torch.autograd.backward(made, dmade)
        dkv_BLy = kv_BLy.grad
        assert dkv_BLy is not None
        if last < whole_BLy.shape[1]:  # no query of this rank has seen what comes behind
            dkv_BLy = F.pad(dkv_BLy, (0, 0, 0, whole_BLy.shape[1] - last))
        return dq_BSHd.flatten(2), by_rank(dkv_BLy, batch.contexts), dsink_H, None, None, None, None, None


def _piece_by_piece(
    pieces: Sequence[tuple[slice, int]],
    made: tuple[Tensor, Tensor],
    document_BL: Tensor | None,
    seen: Seen,
    q_BSHd: Tensor,
    dout_BSHe: Tensor,
    out_BSHe: Tensor,
    sums: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gradients of queries, and of keys and values."""
    size, width = made[0].shape[3], made[1].shape[3]
    with torch.no_grad():
        q, k, v, dout, out = of_one_width(q_BSHd, *(x.detach() for x in made), dout_BSHe, out_BSHe)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (half, end), sum_BHP in zip(pieces, sums, strict=True):
            keys, dkeys = (k[:, :end], v[:, :end]), (dk[:, :end], dv[:, :end])
            given = out[:, half], sum_BHP
            dq[:, half] = part_backward(dout[:, half], q[:, half], keys, _until(end, document_BL), given, seen, dkeys)
    return dq[..., :size], (dk[..., :size], dv[..., :width])


def _again(
    pieces: Sequence[tuple[slice, int]],
    made: tuple[Tensor, Tensor],
    document_BL: Tensor | None,
    seen: Seen,
    q_BSHd: Tensor,
    dout_BSHe: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """The same where torch's kernels keep what they need by themselves: forward once more.  And the gradient of sinks."""
    leaves = [x.detach().requires_grad_() for x in (q_BSHd, *made)]
    sink_H = None if seen.sink_H is None else seen.sink_H.detach().requires_grad_()
    seen = replace(seen, sink_H=sink_H)
    for half, end in pieces:
        with torch.enable_grad():
            q, k, v = leaves[0][:, half], leaves[1][:, :end], leaves[2][:, :end]
            out_BPHe = _by_torch(q, k, v, _until(end, document_BL), seen)
        torch.autograd.backward(out_BPHe, dout_BSHe[:, half])
    dq, dk, dv = (x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)
    return dq, (dk, dv), None if sink_H is None else sink_H.grad


def _by_torch(q_BPHd: Tensor, k_BLGd: Tensor, v_BLGe: Tensor, document_BL: Tensor | None, seen: Seen) -> Tensor:
    """[B, P, H, e], of the last P of L tokens."""
    if document_BL is not None or seen.window or seen.sink_H is not None:
        out_BPX = attend(q_BPHd, k_BLGd, v_BLGe, document_BL, scale=seen.scale, window=seen.window, sink_H=seen.sink_H)
        return out_BPX.unflatten(2, (q_BPHd.shape[2], -1))
    from torch.nn.attention.bias import causal_lower_right  # takes torch's compiler along: not where nobody cuts sequences

    q, k, v = (x.transpose(1, 2) for x in (q_BPHd, k_BLGd, v_BLGe))
    mask, grouped = causal_lower_right(q.shape[2], k.shape[2]), q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=seen.scale, enable_gqa=grouped).transpose(1, 2)


def _scale(heads: HeadsInContext, q_BSHd: Tensor) -> float:
    return q_BSHd.shape[3] ** -0.5 if heads.scale is None else heads.scale


def _halves(length: int) -> tuple[slice, slice]:
    return slice(0, length // 2), slice(length // 2, length)


def _until(end: int, document_BL: Tensor | None) -> Tensor | None:
    return None if document_BL is None else document_BL[:, :end]


def spread_heads(heads: HeadsInContext, q_BSHd: Tensor, kv_BSy: Tensor, contexts: int, *, later: Later | None) -> Tensor:
    """[N, ...]: for each rank the queries, keys and values of its heads, of this rank's tokens."""
    k_BSGd, v_BSGe = heads.keys_and_values(kv_BSy, later)
    groups_C = key_heads(k_BSGd.shape[2], contexts, device=q_BSHd.device)
    q_TCx = q_BSHd.flatten(0, 1).unflatten(1, (contexts, -1)).flatten(2)
    k_TCx, v_TCx = (x.flatten(0, 1)[:, groups_C].flatten(2) for x in (k_BSGd, v_BSGe))
    return torch.cat([q_TCx, k_TCx, v_TCx], dim=2).transpose(0, 1).flatten(0, 1)


def key_heads(groups: int, ranks: int, device: torch.device | None = None) -> Tensor:
    """int64 [C, groups of a rank]: the key heads that a rank's query heads share; where there are fewer than ranks, several have
    the same one."""
    if groups % ranks == 0:
        return torch.arange(groups, device=device).view(ranks, -1)
    return torch.arange(ranks, device=device).view(ranks, 1) * groups // ranks


def attend_with_heads(
    heads: HeadsInContext,
    sizes: tuple[int, int, int, int],
    qkv_Nx: Tensor,
    batch: Batch,
    *,
    logits: list[Tensor] | None,
) -> Tensor:
    """For each rank what this one's heads give of its tokens, [N, X / C].  `sizes`: query heads and key heads before heads were
    exchanged, numbers of a query and of a value; `logits` as in `attend_gathered`, -inf of heads elsewhere."""
    num_heads, groups, size, value = sizes
    contexts, context, sequences = batch.contexts, batch.context, len(batch.sample_B)
    own_g = key_heads(groups, contexts, qkv_Nx.device)[context]
    widths = (num_heads // contexts * size, len(own_g) * size, len(own_g) * value)
    q, k, v = in_order(qkv_Nx, contexts, sequences).split(widths, dim=2)
    q_BLHd, k_BLGd, v_BLGe = q.unflatten(2, (-1, size)), k.unflatten(2, (-1, size)), v.unflatten(2, (-1, value))
    document_BL = batch.uncut.document_BS
    if logits is not None:
        told_G = q.new_full((groups,), float("-inf"))
        told_G[own_g] = largest_logits(q_BLHd, k_BLGd, document_BL, scale=heads.scale, window=heads.window)
        logits.append(told_G)
    sink_H = None if heads.sinks is None else heads.sinks.chunk(contexts)[context]
    mixed_BLX = attend(q_BLHd, k_BLGd, v_BLGe, document_BL, scale=heads.scale, window=heads.window, sink_H=sink_H)
    return by_rank(mixed_BLX, contexts)


def joined_heads(mixed_Nx: Tensor, contexts: int) -> Tensor:
    """[T, X]: what all heads give of this rank's tokens, from each rank's heads, rank after rank."""
    return mixed_Nx.view(contexts, -1, mixed_Nx.shape[1]).transpose(0, 1).flatten(1)
