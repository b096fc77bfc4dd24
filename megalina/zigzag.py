"""Zigzag: which tokens of a sequence each rank of a context-parallel group has.

A sequence is cut in 2C pieces of equal length, and rank c of C has the pieces c and 2C-1-c: behind it in causal attention lie as
many tokens as behind any other rank's (Megatron-Core, Transformer Engine and torch cut likewise).

B sequences, S tokens a sequence, C ranks.
"""

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
    of_rank = x_N.view(ranks, sequences, 2, -1, *x_N.shape[1:])
    pieces = torch.cat([of_rank[:, :, 0], of_rank[:, :, 1].flip(0)])
    return pieces.transpose(0, 1).flatten(1, 2)


def by_rank(x_BS: Tensor, ranks: int) -> Tensor:
    """What `in_order` undoes: [B, S, ...] -> [C x B x S / C, ...]."""
    pieces = x_BS.unflatten(1, (2 * ranks, -1)).transpose(0, 1)
    return torch.stack([pieces[:ranks], pieces[ranks:].flip(0)], dim=2).flatten(0, 3)
