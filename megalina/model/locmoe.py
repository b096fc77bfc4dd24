"""The routers of LocMoE and LocMoE+: an expert's score is of features of its own, whose mean a fixed gate takes.

Sources: Li et al., "LocMoE: a low-overhead MoE for large language model training" (2024), section 3; Li et al., "LocMoE+" or
"Expert-token resonance" (2024).  T tokens, D width, E experts, F = D / E features of each.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.model.late_gradients import LateGradient, Later
from megalina.model.linear import main_grad
from megalina.model.routers import Router, lengths

NORMALIZE_EPS = 1e-12  # of `F.normalize`: the least length that is divided by


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


class LocMoEPlusLearned(LocMoEPlus):
    """As LocMoEPlus, with rows that are learned, each within the features of its expert: E x D / E weights, all one at first, so
    that the first cosines are those of the fixed gate.  Their lengths don't matter.  Of an idle expert's row the probabilities of
    all tokens have gradients, as of any other.

    Source: the authors give the gate 1 / D of the usual parameters, which a fixed one hasn't."""

    def logits(self, x_TD: Tensor, later: Later | None = None) -> Tensor:
        assert self.weight is not None
        wide_TD = x_TD.to(torch.promote_types(torch.promote_types(x_TD.dtype, self.weight.dtype), torch.float32))
        return _BlockCosines.apply(F.normalize(wide_TD, dim=1), self.weight, later)


class _BlockCosines(torch.autograd.Function):
    """The products of tokens of length one and the weight's rows [F], at length one, each in its place within D.

    A product with whole rows is one GEMM that reads the tokens once; those without the zeros in them are no faster."""

    @staticmethod
    def forward(ctx: Any, unit_TD: Tensor, weight_EF: Tensor, later: Later | None) -> Tensor:
        ctx.save_for_backward(unit_TD, weight_EF)
        ctx.main, ctx.later = main_grad(weight_EF), later
        return torch.mm(unit_TD, in_place(F.normalize(weight_EF.to(unit_TD.dtype), dim=1)).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        unit_TD, weight_EF = ctx.saved_tensors
        dunit_TD = dweight_EF = None
        if ctx.needs_input_grad[0]:
            dunit_TD = torch.mm(dy_TE, in_place(F.normalize(weight_EF.to(dy_TE.dtype), dim=1)))
        if ctx.needs_input_grad[1]:
            if ctx.main is None:
                assert ctx.later is None, "no main_grad, no later"
                dweight_EF = _weight_gradient(dy_TE, unit_TD, weight_EF)
            elif ctx.later is None:
                _add_weight_gradient(ctx.main, dy_TE, unit_TD, weight_EF)
            else:
                ctx.later.append(LateGradient(partial(_add_weight_gradient, ctx.main, weight_EF=weight_EF), (dy_TE, unit_TD)))
        return dunit_TD, dweight_EF, None


def in_place(rows_EF: Tensor) -> Tensor:
    """[E, D]: each row at its own features, zeros elsewhere."""
    number, features = rows_EF.shape
    whole_EEF = rows_EF.new_zeros(number, number, features)
    whole_EEF.diagonal(dim1=0, dim2=1).copy_(rows_EF.t())
    return whole_EEF.view(number, number * features)


def _weight_gradient(dy_TE: Tensor, unit_TD: Tensor, weight_EF: Tensor) -> Tensor:
    """[E, F], in the weight's type: of rows that are brought to length one, what is across them alone."""
    wide_EF = weight_EF.to(dy_TE.dtype)
    length_E1 = wide_EF.norm(dim=1, keepdim=True).clamp(min=NORMALIZE_EPS)
    unit_EF = wide_EF / length_E1
    dunit_EF = torch.mm(dy_TE.t(), unit_TD).view(len(wide_EF), *wide_EF.shape).diagonal(dim1=0, dim2=1).t()
    return ((dunit_EF - unit_EF * (unit_EF * dunit_EF).sum(1, keepdim=True)) / length_E1).to(weight_EF.dtype)


def _add_weight_gradient(main_EF: Tensor, dy_TE: Tensor, unit_TD: Tensor, weight_EF: Tensor) -> None:
    main_EF.add_(_weight_gradient(dy_TE, unit_TD, weight_EF))


def grap(num_experts: int, x_TD: Tensor) -> Tensor:
    """[E, D] for these tokens: row i averages features j with i D / E <= j < (i + 1) D / E, each feature of one expert."""
    width = x_TD.shape[1]
    expert_D = torch.arange(width, device=x_TD.device) * num_experts // width
    rows_ED = F.one_hot(expert_D, num_experts).t().to(x_TD.dtype)
    return rows_ED / rows_ED.sum(dim=1, keepdim=True)
