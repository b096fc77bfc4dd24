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
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, label_T: Tensor, words: int) -> Tensor:
        real = logits_TV[:, :words]
        real = real.float() if real.dtype in (torch.bfloat16, torch.float16) else real
        if words == 0:  # all padding
            lse_T = real.new_full((len(real),), float("-inf"))
        else:
            lse_T = torch.logsumexp(real, 1)
        here_T = (label_T >= 0) & (label_T < words)
        index_T1 = label_T.clamp(0, max(words - 1, 0)).unsqueeze(1)
        target_T = torch.where(here_T, real.gather(1, index_T1).squeeze(1), 0.0) if words else torch.zeros_like(lse_T)
        ctx.save_for_backward(logits_TV, lse_T, here_T, index_T1)
        ctx.words = words
        return torch.stack([lse_T, target_T], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstat_T2: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, lse_T, here_T, index_T1 = ctx.saved_tensors
        words = ctx.words
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, words:] = 0
        if words:
            real = grad_TV[:, :words]
            wide = real if real.dtype == dstat_T2.dtype else torch.empty_like(real, dtype=dstat_T2.dtype)
            torch.sub(logits_TV[:, :words], lse_T.unsqueeze(1), out=wide)
            wide.exp_().mul_(dstat_T2[:, :1])
            wide.scatter_add_(1, index_T1, torch.where(here_T, dstat_T2[:, 1], 0.0).unsqueeze(1))
            if wide is not real:
                real.copy_(wide)
        return grad_TV, None, None
