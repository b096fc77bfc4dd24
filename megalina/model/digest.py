"""Digests: 64-bit fingerprints of tokens and of routing decisions, as two sums of 32 bits.

Sums don't depend on who holds what: each token's part is a hash of its own place (sample, position), so the sum over any
layout's ranks is the same number.  They serve to compare runs bit by bit, not against somebody who wants to deceive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.batch import Batch
from megalina.model.permute import RowOrder

_MASK = 0xFFFFFFFF


def tokens_digest(batch: Batch) -> Tensor:
    """int64 [2]: of which tokens and labels stand where, and which of them count."""
    sample_B1 = batch.sample_B.unsqueeze(1)
    counts_BS = batch.loss_mask_BS.long() + 2 * batch.valid_BS
    return _limbs(_mix(_mix(_mix(sample_B1 * 0x9E3779B1 + batch.place_S, batch.tokens_BS), batch.labels_BS), counts_BS))


def routing_digest(order: RowOrder, sample_T: Tensor, position_T: Tensor) -> Tensor:
    """int64 [2]: of which experts each token goes to, in the order of its choices; a dropped choice counts as such."""
    count_E = order.count_E
    experts_E = F.pad(order.experts, (0, 1), value=len(count_E))
    expert_N = experts_E.repeat_interleave(F.pad(count_E, (0, 1), value=1))  # the last row stands for nobody
    return choices_digest(expert_N[order.row_TK], sample_T, position_T)


def choices_digest(expert_TK: Tensor, sample_T: Tensor, position_T: Tensor) -> Tensor:
    """int64 [2]: of each token's experts, in the order of its choices."""
    column_K = torch.arange(expert_TK.shape[1], device=expert_TK.device)
    place_T = sample_T * 0x9E3779B1 + position_T
    return _limbs(_mix(place_T.unsqueeze(1) * 0x85EBCA6B + column_K, expert_TK))


def _mix(state: Tensor, value: Tensor) -> Tensor:
    """int64 arithmetic wraps around; xor and shift bring high bits down (as in MurmurHash3's finaliser)."""
    mixed = (state ^ (value * -7046029254386353131)) * -49064778989728563
    return mixed ^ (mixed >> 29)


def _limbs(parts: Tensor) -> Tensor:
    """Each half is summed apart: a carry from one to the other would depend on how the parts are cut."""
    return torch.stack([(parts & _MASK).sum() & _MASK, ((parts >> 32) & _MASK).sum() & _MASK])
