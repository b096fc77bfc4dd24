"""The routers of LocMoE and LocMoE+, whose gate is fixed: an expert's score is the mean of features of its own.

Sources: Li et al., "LocMoE: a low-overhead MoE for large language model training" (2024), section 3; Li et al., "LocMoE+" or
"Expert-token resonance" (2024).  T tokens, D width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.model.linear import Later
from megalina.model.routers import Router, lengths


class LocMoE(Router):
    """Group average pooling (GrAP, equation 4): expert i scores a token by the mean of its i-th group of features.  The rows of
    this gate are orthogonal, and nothing of it is learned: what balances, or keeps tokens local, teaches the layers before it.

    An idle expert gets gradients where a token's scores do: its probability is in every softmax."""

    def logits(self, x_TD: Tensor, later: Later | None = None) -> Tensor:
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        return F.linear(wide_TD, grap(self.num_experts, wide_TD))

    def log_scores(self, logits_TE: Tensor) -> Tensor:
        """Rectified, as in equation 2, and divided by the temperature: means of groups differ by little, and their softmax would
        be nearly flat.  A token without a score above zero gets no gradient."""
        return logits_TE.relu() / self.config.temperature

    def probabilities(self, logits_AE: Tensor) -> Tensor:
        return self.log_scores(logits_AE).softmax(dim=1)

    def cosines(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        rows_ED = grap(self.num_experts, x_TD.to(logits_TE.dtype))
        return logits_TE / lengths(x_TD, logits_TE.dtype)[:, None] / lengths(rows_ED, logits_TE.dtype)


class LocMoEPlus(LocMoE):
    """The same gate; the score is the cosine between token and row.  Tokens choose their best experts, and of an expert's tokens
    those with the highest affinity are kept (`router.drop=probability`, within `router.capacity_factor`)."""

    def logits(self, x_TD: Tensor, later: Later | None = None) -> Tensor:
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        return F.linear(F.normalize(wide_TD, dim=1), F.normalize(grap(self.num_experts, wide_TD), dim=1))

    def log_scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE / self.config.temperature

    def cosines(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        return logits_TE


def grap(num_experts: int, x_TD: Tensor) -> Tensor:
    """[E, D] for these tokens: row i averages features j with i D / E <= j < (i + 1) D / E, each feature of one expert."""
    width = x_TD.shape[1]
    expert_D = torch.arange(width, device=x_TD.device) * num_experts // width
    rows_ED = F.one_hot(expert_D, num_experts).t().to(x_TD.dtype)
    return rows_ED / rows_ED.sum(dim=1, keepdim=True)
