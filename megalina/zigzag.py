"""Zigzag: which tokens of a sequence each rank of a context-parallel group has.

A sequence is cut in 2C pieces of equal length, and rank c of C has the pieces c and 2C-1-c: before its tokens lie as many as
before any other rank's (Megatron-Core, Transformer Engine and torch cut likewise).

B sequences, S tokens a sequence, C ranks, P tokens a piece.
"""

from typing import Any

import torch
from torch import Tensor


def pieces_of(ranks: int, rank: int) -> tuple[int, int]:
    """The numbers of this rank's pieces, in the order in which it has them."""
    return rank, 2 * ranks - 1 - rank


def places(length: int, ranks: int, rank: int, device: torch.device | None = None) -> Tensor:
    """int64 [S / C]: where this rank's tokens are in a sequence of S."""
    return own_part(torch.arange(length, device=device).unsqueeze(0), ranks, rank)[0]


def own_part(x_BS: Tensor, ranks: int, rank: int) -> Tensor:
    """[B, S, ...] -> [B, S / C, ...]."""
    pieces = x_BS.unflatten(1, (2 * ranks, -1))
    return torch.cat([pieces[:, piece] for piece in pieces_of(ranks, rank)], dim=1)


def in_order(x_N: Tensor, ranks: int, sequences: int) -> Tensor:
    """What all ranks have, rank after rank, [C x B x S / C, ...] -> in the order of the sequences, [B, S, ...]."""
    out: Tensor = _InOrder.apply(x_N, ranks, sequences)
    return out


def by_rank(x_BS: Tensor, ranks: int) -> Tensor:
    """What `in_order` undoes: [B, S, ...] -> [C x B x S / C, ...]."""
    out: Tensor = _ByRank.apply(x_BS, ranks)
    return out


class _InOrder(torch.autograd.Function):
    """Each is a copy, and the other's backward."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, ranks: int, sequences: int) -> Tensor:
        ctx.ranks = ranks
        x_CB2P = x_N.view(ranks, sequences, 2, -1, *x_N.shape[1:])
        pieces = x_N.new_empty(sequences, 2 * ranks, *x_CB2P.shape[3:])
        for rank in range(ranks):
            for half, piece in enumerate(pieces_of(ranks, rank)):
                pieces[:, piece] = x_CB2P[rank, :, half]
        return pieces.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, dx_BS: Tensor) -> tuple[Tensor, None, None]:
        return by_rank(dx_BS, ctx.ranks), None, None


class _ByRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, ranks: int) -> Tensor:
        ctx.ranks, ctx.sequences = ranks, len(x_BS)
        pieces = x_BS.unflatten(1, (2 * ranks, -1))
        x_CB2P = x_BS.new_empty(ranks, len(x_BS), 2, *pieces.shape[2:])
        for rank in range(ranks):
            for half, piece in enumerate(pieces_of(ranks, rank)):
                x_CB2P[rank, :, half] = pieces[:, piece]
        return x_CB2P.flatten(0, 3)

    @staticmethod
    def backward(ctx: Any, dx_N: Tensor) -> tuple[Tensor, None]:
        return in_order(dx_N.contiguous(), ctx.ranks, ctx.sequences), None
