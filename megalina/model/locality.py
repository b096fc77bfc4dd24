"""Locality: the loss that keeps tokens on the node where their sequence is at home (LocMoE, Li et al. 2024, equation 6).

A home is a function of numbers, never of the rank that something happens to be on: sequence number s is at home on node s mod N,
expert i on node i N // E.  So no layout changes the loss.  A sequence's loss is the Kullback-Leibler divergence of its mean
probabilities from a distribution that is nearly all on the experts of its home.

T own tokens, A all tokens of the micro-batch, B sequences, E experts, N nodes.
"""

import torch
from torch import Tensor

from megalina.model.tokens import OwnTokens, RouterTokens

ELSEWHERE = 0.01  # of the distribution that is aimed at, on the experts of other nodes: without it the divergence may be infinite


def locality_loss(prob_TE: Tensor, prob_AE: Tensor, tokens: RouterTokens, own: OwnTokens, nodes: int) -> Tensor:
    """Scalar: these tokens' part of the sum over sequences of (valid tokens) x (divergence).

    The divergence is no sum over tokens.  But with the means of all tokens' probabilities, `prob_AE` without gradient, the sum
    over tokens of probability x (log mean - log aim) has its value, and its gradient too, since probabilities sum to one."""
    groups, num_experts = tokens.by_sequence, prob_TE.shape[1]
    valid_A = tokens.valid_A
    with torch.no_grad():
        weight_A = valid_A.to(prob_AE.dtype)
        mean_BE = (prob_AE * weight_A[:, None]).view(groups.number, -1, num_experts).sum(1)
        mean_BE /= groups.tokens_G.clamp(min=1)[:, None]
        home_B = tokens.sample_A.view(groups.number, -1)[:, 0] % nodes
        far_BE = mean_BE.clamp(min=torch.finfo(mean_BE.dtype).tiny).log() - aim(home_B, num_experts, nodes, mean_BE.dtype).log()
        far_TE = far_BE.repeat_interleave(len(valid_A) // groups.number, dim=0)[own]
    return (prob_TE * far_TE).sum(1).masked_fill(~valid_A[own], 0.0).sum()


def aim(home_B: Tensor, num_experts: int, nodes: int, dtype: torch.dtype) -> Tensor:
    """[B, E]: the distribution of a token's experts if it stays at home, but for a little."""
    node_E = torch.arange(num_experts, device=home_B.device) * nodes // num_experts
    here_BE = node_E == home_B[:, None]
    near_B1 = here_BE.to(dtype).sum(1, keepdim=True)
    elsewhere = ELSEWHERE if nodes > 1 else 0.0
    return torch.where(here_BE, (1 - elsewhere) / near_B1, elsewhere / (num_experts - near_B1).clamp(min=1))
