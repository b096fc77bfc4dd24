"""LocMoE's lower bound of an expert's capacity, from how near tokens are to the rows of their experts.

Source: Li et al., "LocMoE" (2024), section 3, lemma 3 and theorem 1 (equations 8 and 9).  A token belongs to an expert where the
cosine between the two is at least delta.  Of tokens that point anywhere alike, an expert needs at least 1 / (E p) to get one
that belongs to it, p being the probability to belong to it.  The paper doesn't say which statistic of the cosines delta is, so
`router.capacity_delta` does.

Cosines are counted in bins: counts are integers, so their sum over micro-batches and ranks is the same in every layout, and so
are all statistics of it.

T tokens, K experts a token, E experts, D model width, G groups of tokens that share capacity.
"""

import math

import torch
from torch import Tensor

from megalina.blocks.sizes import NEARNESS_BINS
from megalina.config import RouterConfig

LARGEST = 2.0**53  # tokens: beyond any group, and float64 counts no further


def nearness(cosine_TK: Tensor, there_TK: Tensor) -> Tensor:
    """int64 [NEARNESS_BINS]: how many cosines are in each bin of [0, 1]; those below 0 are in the first.  `there_TK`: which of
    them count."""
    bin_TK = (cosine_TK * NEARNESS_BINS).long().clamp(0, NEARNESS_BINS - 1)
    bin_N = bin_TK.masked_fill(~there_TK, NEARNESS_BINS).flatten()
    counted = torch.zeros(NEARNESS_BINS + 1, dtype=torch.int64, device=bin_N.device)
    return counted.scatter_add_(0, bin_N, torch.ones_like(bin_N))[:NEARNESS_BINS]


def delta_of(count_B: Tensor, config: RouterConfig) -> float | None:
    """The delta of a step's counts, None where nothing was counted.

    min: the lower edge of the first bin with a cosine; quantile: of the bin below whose upper edge `router.capacity_quantile` of
    the cosines are; mean: of all cosines, each taken for the middle of its bin."""
    count = count_B.double().cpu()
    total = count.sum().item()
    if not total:
        return None
    if config.capacity_delta == "mean":
        middle_B = (torch.arange(NEARNESS_BINS, dtype=torch.float64) + 0.5) / NEARNESS_BINS
        return float((count * middle_B).sum() / total)
    least = 1.0 if config.capacity_delta == "min" else max(1.0, config.capacity_quantile * total)
    return int((count.cumsum(0) < least).sum()) / NEARNESS_BINS


def log_belonging(delta: Tensor, width: int) -> Tensor:
    """log p: of the probability that the cosine between a row and a token of random direction is at least delta in size
    (equation 8, in the form for large `width` of equation 9).  Beyond delta^2 D = 1,400 or so p itself is below any float64."""
    square = delta.square()
    x = (square * width / (2 - square)).sqrt()
    return torch.special.erfcx(x).log() - x.square()


def least_tokens(delta: Tensor, *, width: int, num_experts: int) -> Tensor:
    """int64: the bound in whole tokens, at most `LARGEST`."""
    tokens = (-log_belonging(delta, width) - math.log(num_experts)).clamp(max=math.log(LARGEST)).exp()
    return tokens.ceil().long()


def bounded(most_G: Tensor, delta: Tensor, *, width: int, num_experts: int, least: int) -> Tensor:
    """int64 [G]: each group's capacity by the bound, at least `least` tokens and at most `most_G`.  A negative delta isn't known
    yet: `most_G`."""
    tokens = least_tokens(delta.clamp(min=0.0), width=width, num_experts=num_experts).clamp(min=least)
    return torch.where(delta < 0, most_G, torch.minimum(tokens, most_G))
