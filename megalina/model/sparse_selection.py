"""Sparse selection: which experts of a densely trained model a token uses (DS-MoE, Pan et al. 2024, section 3.3).

T tokens, E experts, K columns.
"""

import math

import torch
from torch import Tensor

from megalina.blocks.selection import Selection
from megalina.model.selection import highest


def selected(selection: Selection, prob_TE: Tensor, valid_T: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] each: experts, the most probable first, E where there is none, and their probabilities as they are, 0 there.

    Padding gets none.  K is as large as the most that a token has."""
    num_experts = prob_TE.shape[1]
    above_T = (num_experts * prob_TE > selection.threshold).sum(1)
    match selection.rule:
        case "top_k":
            count_T = torch.full_like(above_T, selection.k)
        case "threshold":
            count_T = above_T.clamp(min=1)
        case "threshold_top_k":
            mean = float(above_T[valid_T].double().mean()) if bool(valid_T.any()) else 1.0
            count_T = torch.full_like(above_T, max(1, math.floor(mean + 0.5)))
    count_T = count_T.masked_fill(~valid_T, 0)
    columns = max(1, int(count_T.max())) if len(count_T) else 1
    best_TK = highest(prob_TE.detach(), columns)
    nobody_TK = torch.arange(columns, device=prob_TE.device) >= count_T.unsqueeze(1)
    return best_TK.masked_fill(nobody_TK, num_experts), prob_TE.gather(1, best_TK).masked_fill(nobody_TK, 0.0)
