"""Mutual information of tokens and experts as a loss (DS-MoE, Pan et al. 2024, equations 4 to 6).

A group's loss is the entropy of its tokens' experts, on average, less the entropy of their mean: low where each token is sure
and the experts are even.  It is minus the mutual information: 0 where all tokens say the same, minus log E at best.

T own tokens, A all tokens of the micro-batch, E experts, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.model.tokens import Groups, OwnTokens


def mutual_information_loss(log_TE: Tensor, log_AE: Tensor, groups: Groups, own: OwnTokens) -> Tensor:
    """Scalar: these tokens' part of the sum over groups of (valid tokens) x (loss).

    `log_TE`: logarithms of probabilities, `log_AE` those of all tokens without gradient.  A token's part is the divergence of its
    probabilities from its group's mean, with minus; seen as constant the mean gives the same gradient, since probabilities sum to
    one."""
    number, num_experts = groups.number, log_TE.shape[1]
    with torch.no_grad():
        sum_GE = log_AE.new_zeros(number + 1, num_experts).index_add_(0, groups.group_A, log_AE.exp())[:-1]
        mean_GE = sum_GE / groups.tokens_G.clamp(min=1)[:, None]
        log_mean_GE = F.pad(mean_GE.clamp(min=torch.finfo(mean_GE.dtype).tiny).log(), (0, 0, 0, 1))
        group_T = groups.group_A[own]
    parts_T = (log_TE.exp() * (log_mean_GE[group_T] - log_TE)).sum(1)
    return parts_T.masked_fill(group_T == number, 0.0).sum()
