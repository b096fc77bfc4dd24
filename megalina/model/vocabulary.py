"""The output head: what a cross entropy needs to know of each token's logits, also when the vocabulary is cut over ranks.

Shapes: T tokens, D width, V words of this rank (of them w real ones, the others padding), R ranks.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalina.model.late_gradients import LateGradient, Later
from megalina.model.linear import add_outer, main_grad


def head_stat(n_TD: Tensor, weight_VD: Tensor, label_T: Tensor, words: int, *, later: Later | None = None) -> Tensor:
    """[T, 2], at least float32: log-sum-exp of a token's logits, and the logit of its label.

    `label_T`: index among this rank's words; outside [0, words) the label is another rank's and its logit counts 0.
    Only the first `words` rows of the weight are real.  The loss is log-sum-exp minus logit; over ranks the first combines
    by log-sum-exp, the second by sum.  The largest activation of a step, [T, V], exists once: it holds the logits, then the
    probabilities, then the logits' gradient.  The weight's gradient goes to its `main_grad`, see linear.py, as does `later`.
    """
    return _HeadStat.apply(n_TD, weight_VD, label_T, words, later)


def cross_entropy(stat_RT2: Tensor) -> Tensor:
    """[T], nats: from the statistics of each rank's words, [R, T, 2]."""
    if len(stat_RT2) == 1:
        return stat_RT2[0, :, 0] - stat_RT2[0, :, 1]
    return torch.logsumexp(stat_RT2[..., 0], 0) - stat_RT2[..., 1].sum(0)


class _HeadStat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n_TD: Tensor, weight_VD: Tensor, label_T: Tensor, words: int, later: Later | None) -> Tensor:
        logits_TV = torch.mm(n_TD, weight_VD.t())
        real_Tw = logits_TV[:, :words]
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        here_T = (label_T >= 0) & (label_T < words)
        index_T1 = label_T.clamp(0, max(words - 1, 0)).unsqueeze(1)
        if words:
            target_T = real_Tw.gather(1, index_T1).squeeze(1).to(wide).where(here_T, 0.0)
            most_T1, word_T1 = real_Tw.max(1, keepdim=True)
            prob_Tw = _softmax(real_Tw, wide)
            # the likeliest word's probability is at least 1 / words, so its logarithm is safe
            lse_T = (most_T1.to(wide) - prob_Tw.gather(1, word_T1).log()).squeeze(1)
        else:  # all padding
            prob_Tw = real_Tw.to(wide)
            lse_T = prob_Tw.new_full((len(prob_Tw),), float("-inf"))
            target_T = torch.zeros_like(lse_T)
        ctx.save_for_backward(n_TD, weight_VD, here_T, index_T1)
        ctx.words, ctx.weight_grad, ctx.later = words, main_grad(weight_VD), later
        if any(ctx.needs_input_grad):
            ctx.logits_TV, ctx.prob_Tw = logits_TV, prob_Tw
        return torch.stack([lse_T, target_T], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstat_T2: Tensor) -> tuple[Tensor | None, ...]:
        n_TD, weight_VD, here_T, index_T1 = ctx.saved_tensors
        logits_TV, grad_Tw = ctx.logits_TV, ctx.prob_Tw
        ctx.logits_TV = ctx.prob_Tw = None
        if logits_TV is None:  # a second backward through the same graph
            logits_TV = torch.mm(n_TD, weight_VD.t())
            grad_Tw = _softmax(logits_TV[:, : ctx.words], dstat_T2.dtype)
        words = ctx.words
        grad_Tw.mul_(dstat_T2[:, :1])
        if words:
            grad_Tw.scatter_add_(1, index_T1, dstat_T2[:, 1].where(here_T, 0.0).unsqueeze(1))
        dlogits_TV = logits_TV
        if grad_Tw.dtype != logits_TV.dtype:
            dlogits_TV[:, :words] = grad_Tw
        dlogits_TV[:, words:] = 0
        dn_TD = torch.mm(dlogits_TV, weight_VD) if ctx.needs_input_grad[0] else None
        dweight_VD = None
        if ctx.needs_input_grad[1]:
            if ctx.weight_grad is None:
                dweight_VD = torch.mm(dlogits_TV.t(), n_TD)
            elif ctx.later is None:
                add_outer(ctx.weight_grad, dlogits_TV, n_TD)
            else:
                ctx.later.append(LateGradient(partial(add_outer, ctx.weight_grad), (dlogits_TV, n_TD)))
        return dn_TD, dweight_VD, None, None, None


def _softmax(real_Tw: Tensor, wide: torch.dtype) -> Tensor:
    """The probabilities, in the logits' own memory if they are wide enough."""
    if real_Tw.dtype != wide:
        return torch.softmax(real_Tw, 1, dtype=wide)
    return torch.softmax(real_Tw, 1, out=real_Tw)
