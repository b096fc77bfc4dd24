"""Capacity: how many tokens of a group an expert takes, and who is left out beyond it.

N assignments (token, expert), G groups.
"""

from fractions import Fraction

import torch
from torch import Tensor


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
