"""The vocabulary's statistics of each token: what a cross entropy needs of the logits, also when they are cut over ranks.

Shapes: T tokens, V words of this rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def vocabulary_stat(logits_TV: Tensor, label_T: Tensor, words: int) -> Tensor:
    """[T, 2], at least float32: log-sum-exp of a token's logits, and the logit of its label.

    `label_T`: index among this rank's words; outside [0, words) the label is another rank's and its logit counts 0.
    Only the first `words` columns are real, the others are padding.  The loss is log-sum-exp minus logit; over ranks the
    first combines by log-sum-exp, the second by sum.
    """
    return _VocabularyStat.apply(logits_TV, label_T, words)


def cross_entropy(stat_RT2: Tensor) -> Tensor:
    """[T], nats: from the statistics of each rank's words, [R, T, 2]."""
    if len(stat_RT2) == 1:
        return stat_RT2[0, :, 0] - stat_RT2[0, :, 1]
    return torch.logsumexp(stat_RT2[..., 0], 0) - stat_RT2[..., 1].sum(0)


class _VocabularyStat(torch.autograd.Function):
    """Keeps the probabilities, not the logits: one pass over them is the whole backward."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, label_T: Tensor, words: int) -> Tensor:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        real_Tw = logits_TV[:, :words]
        here_T = (label_T >= 0) & (label_T < words)
        index_T1 = label_T.clamp(0, max(words - 1, 0)).unsqueeze(1)
        if words:
            prob_Tw = torch.softmax(real_Tw, 1, dtype=wide)
            most_T1, word_T1 = real_Tw.max(1, keepdim=True)
            # the likeliest word's probability is at least 1 / words, so its logarithm is safe
            lse_T = (most_T1.to(wide) - prob_Tw.gather(1, word_T1).log()).squeeze(1)
            target_T = real_Tw.gather(1, index_T1).squeeze(1).to(wide).where(here_T, 0.0)
        else:  # all padding
            prob_Tw = logits_TV.new_zeros(len(logits_TV), 0, dtype=wide)
            lse_T = prob_Tw.new_full((len(prob_Tw),), float("-inf"))
            target_T = torch.zeros_like(lse_T)
        ctx.save_for_backward(prob_Tw, here_T, index_T1)
        ctx.shape, ctx.dtype = logits_TV.shape, logits_TV.dtype
        return torch.stack([lse_T, target_T], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstat_T2: Tensor) -> tuple[Tensor, None, None]:
        prob_Tw, here_T, index_T1 = ctx.saved_tensors
        words = prob_Tw.shape[1]
        grad_Tw = prob_Tw * dstat_T2[:, :1]
        if words:
            grad_Tw.scatter_add_(1, index_T1, dstat_T2[:, 1].where(here_T, 0.0).unsqueeze(1))
        if grad_Tw.shape == ctx.shape and grad_Tw.dtype == ctx.dtype:
            return grad_Tw, None, None
        grad_TV = grad_Tw.new_zeros(ctx.shape, dtype=ctx.dtype)
        grad_TV[:, :words] = grad_Tw
        return grad_TV, None, None
