"""Attention where each sequence is cut over the ranks of context parallelism, in torch.

`all_gather`: a rank gets the keys and values of all tokens (what a kind of attention makes them of, if that is less) and attends
with the queries of its own tokens.  `all_to_all`: ranks exchange heads for tokens (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv:2309.14509), attend with their heads over whole sequences, and exchange back.  Either way what is told of a token's place
and document is of its sequence, so masks are those of one process.

Shapes: B sequences, S tokens a sequence here, L = C x S tokens a sequence, C ranks, T = B x S, N = C x T, D width; H query heads,
G key heads, d numbers of a query or key, e of a value, y of what keys and values are made of, X = H x e.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.model.attend import attend
from megalina.model.attend_part import attend_part
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
    sequences, length = batch.tokens_BS.shape
    kv_BLy = in_order(kv_Ny, batch.contexts, sequences)[:, : max(ends)]
    k_BLGd, v_BLGe = heads.keys_and_values(kv_BLy, later)
    q_BSHd, document_BL, out = q_TX.view(sequences, length, -1, k_BLGd.shape[-1]), batch.uncut.document_BS, []
    for q_BPHd, end in zip(q_BSHd.chunk(2, dim=1), ends, strict=True):
        seen = k_BLGd[:, :end], v_BLGe[:, :end], None if document_BL is None else document_BL[:, :end]
        if logits is not None:
            logits.append(largest_logits(q_BPHd, seen[0], seen[2], window=heads.window))
        out.append(attend_part(q_BPHd, *seen, scale=heads.scale, window=heads.window, sink_H=heads.sinks))
    return torch.cat(out, dim=1).flatten(0, 1)


def spread_heads(heads: HeadsInContext, n_TD: Tensor, batch: Batch, *, later: Later | None) -> Tensor:
    """[N, ...]: for each rank the queries, keys and values of its heads, of this rank's tokens."""
    q_BSHd = heads.queries(n_TD, batch, later)
    k_BSGd, v_BSGe = heads.keys_and_values(heads.compact_keys(n_TD, batch, later), later)
    groups_C = key_heads(k_BSGd.shape[2], batch.contexts, device=n_TD.device)
    q_TCx = q_BSHd.flatten(0, 1).unflatten(1, (batch.contexts, -1)).flatten(2)
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
        told_G[own_g] = largest_logits(q_BLHd, k_BLGd, document_BL, window=heads.window)
        logits.append(told_G)
    sink_H = None if heads.sinks is None else heads.sinks.chunk(contexts)[context]
    mixed_BLX = attend(q_BLHd, k_BLGd, v_BLGe, document_BL, scale=heads.scale, window=heads.window, sink_H=sink_H)
    return by_rank(mixed_BLX, contexts)


def joined_heads(mixed_Nx: Tensor, contexts: int) -> Tensor:
    """[T, X]: what all heads give of this rank's tokens, from each rank's heads, rank after rank."""
    return mixed_Nx.view(contexts, -1, mixed_Nx.shape[1]).transpose(0, 1).flatten(1)
