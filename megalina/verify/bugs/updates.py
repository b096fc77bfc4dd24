"""Bugs in the norm of the gradients and in the update of the weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalina.config import PretrainConfig
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.step.program import Op
from megalina.verify.bugs.change import after, expert_buckets, with_program


def norm_without_experts(trainable: Trainable, config: PretrainConfig) -> None:
    def without(out: Tensor, *_: Any) -> Tensor:
        out[3] -= torch.stack([trainable.buckets[name].square_sum() for name in expert_buckets(trainable)]).sum()
        return out

    after(trainable, "measure", without)


def norm_per_rank(trainable: Trainable, config: PretrainConfig) -> None:
    def own(result: StepResult, *_: Any) -> StepResult:
        squares = sum(b.grad[s.start : s.stop].square().sum().item() for b in trainable.buckets.values() for s in b.slices)
        norm, most = squares**0.5, config.optim.clip_norm
        return replace(result, grad_norm=norm, grad_scale=min(1.0, most / (norm + 1e-6)) if most > 0 else 1.0)

    after(trainable, "verdict", own)


def stale_zero_shard(trainable: Trainable, config: PretrainConfig) -> None:
    with_program(trainable, tuple(s for s in trainable.program if s.op is not Op.PARAMS))


def decay_on_norms(trainable: Trainable, config: PretrainConfig) -> None:
    for bucket in trainable.buckets.values():
        bucket.slices = [replace(s, decay=True) for s in bucket.slices]
