"""Selection: which experts a token goes to, given the scores, and who is left out beyond an expert's capacity.  Decisions only:
nothing here has a gradient.

A tokens, E experts, K experts a token, B groups of S tokens each (A = B x S); N assignments (token, expert), G groups.
"""

from fractions import Fraction

import torch
from torch import Tensor

from megalina.model.noise import uniform


def highest(score_AE: Tensor, k: int) -> Tensor:
    """[A, k] int64: columns of the k highest scores, falling; equal scores in order of their column.

    `torch.topk` leaves the order of equal scores open; `torch.max` gives the first of them, and k rounds cost no more.
    """
    rest_AE = score_AE.clone() if k > 1 else score_AE
    columns = []
    for i in range(k):
        columns.append(rest_AE.max(dim=1, keepdim=True).indices)
        if i < k - 1:
            rest_AE.scatter_(1, columns[-1], float("-inf"))
    return torch.cat(columns, dim=1)


def best_groups(score_AE: Tensor, num_groups: int, groups_per_token: int) -> Tensor:
    """The scores with -inf outside each token's best groups of experts, a group being worth its two best experts.

    Source: DeepSeek-V3 technical report (2024), section 2.1.2.
    """
    grouped = score_AE.view(len(score_AE), num_groups, -1)
    worth = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
    return _within(grouped, worth, groups_per_token, float("-inf"))


def groups_of_best(prob_AE: Tensor, num_groups: int, groups_per_token: int) -> Tensor:
    """The probabilities with 0 outside each token's best groups of experts, a group being worth its most probable expert.

    Source: DeepSeek-V2 technical report (2024), section 2.1.2, and its published code for the mask.
    """
    grouped = prob_AE.view(len(prob_AE), num_groups, -1)
    return _within(grouped, grouped.amax(dim=2), groups_per_token, 0.0)


def _within(grouped: Tensor, worth: Tensor, groups_per_token: int, outside: float) -> Tensor:
    """[A, E]: scores [A, groups, experts of a group], `outside` but for the groups that are worth most."""
    shut = torch.ones_like(worth, dtype=torch.bool).scatter_(1, highest(worth, groups_per_token), False)
    return grouped.masked_fill(shut[:, :, None], outside).flatten(1)


def hashed(token_A: Tensor, layer: int, k: int, num_experts: int) -> Tensor:
    """[A, k] int64, distinct experts a token: those with the highest hash of (token id, layer, expert).

    Source: Roller et al., "Hash layers for large sparse models" (2021); the seed plays no part, so a checkpoint
    routes the same wherever it is loaded.
    """
    return highest(uniform(0, layer, "hash", token_A, torch.zeros_like(token_A), num_experts), k)


def taken_by_experts(score_BSE: Tensor, padding_BS1: Tensor | None, room_BS1: Tensor) -> Tensor:
    """[B, S, E] bool: each expert takes the tokens of group b that score highest, earlier ones first, as many of them as
    `room_BS1` begins with True.  `padding_BS1`: tokens that nobody takes, None: there are none.

    Source: Zhou et al., "Mixture-of-experts with expert choice routing" (2022).
    """
    if padding_BS1 is not None:
        score_BSE = score_BSE.masked_fill(padding_BS1, float("-inf"))
    order_BSE = score_BSE.sort(dim=1, descending=True, stable=True).indices
    taken_BSE = torch.empty_like(order_BSE, dtype=torch.bool).scatter_(1, order_BSE, room_BS1.expand_as(order_BSE))
    return taken_BSE if padding_BS1 is None else taken_BSE & ~padding_BS1


def capacity(tokens_G: Tensor, factor: float, top_k: int, num_experts: int) -> Tensor:
    """[G] int64: ceil(factor x tokens x top_k / num_experts), tokens of each group counted without padding.

    Exact: 1.1 x 50 tokens are 55, not the 56 that a rounded product gives.
    """
    share = Fraction(factor).limit_denominator(1_000_000) * top_k / num_experts
    return -(-(tokens_G * share.numerator) // share.denominator)


def within_capacity(queue_N: Tensor, capacity_Q: Tensor, priority_N: Tensor | None) -> Tensor:
    """[N] bool: which assignments are among the first `capacity_Q[q]` of their queue q.

    A queue is one expert of one group; an assignment's place in it is by order in the tensor, or by falling
    `priority_N` with ties in that order.
    """
    order_N = None if priority_N is None else priority_N.sort(dim=0, descending=True, stable=True).indices
    by_queue_N, index_N = (queue_N if order_N is None else queue_N[order_N]).sort(stable=True)
    order_N = index_N if order_N is None else order_N[index_N]
    length_Q = torch.zeros_like(capacity_Q).scatter_add_(0, queue_N, torch.ones_like(queue_N))
    start_Q = length_Q.cumsum(0) - length_Q
    place_N = torch.arange(len(queue_N), device=queue_N.device) - start_Q[by_queue_N]
    kept_N = place_N < capacity_Q[by_queue_N]
    return torch.empty_like(kept_N).scatter_(0, order_N, kept_N)
