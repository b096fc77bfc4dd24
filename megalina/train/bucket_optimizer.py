"""The optimizer of all buckets: updates one when its stage comes, and knows its state by parameter for checkpoints."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megalina.config import OptimConfig
from megalina.parallel.buckets import Bucket
from megalina.parallel.functions import Verdict
from megalina.parallel.reshard import gathered, members_of, scatter
from megalina.train.optim import FlatOptimizer, FlatTensor


class BucketOptimizer:
    """Under bfloat16 parameters it holds float32 master weights of this rank's slices; else the parameters are them."""

    def __init__(self, config: OptimConfig, buckets: Mapping[str, Bucket]):
        self.lr = config.lr  # the trainer sets it before each step
        self.buckets = buckets
        self._masters: dict[str, list[Tensor]] = {}
        self._optimizers: dict[str, FlatOptimizer] = {}
        for name, bucket in buckets.items():
            masters = [bucket.param[s.start : s.stop] for s in bucket.slices]
            if bucket.param.dtype != bucket.dtype:
                masters = [m.to(bucket.dtype) for m in masters]
            self._masters[name] = masters
            grads = [bucket.grad[s.start : s.stop] for s in bucket.slices]
            flat = [FlatTensor(m, g, s.decay) for m, g, s in zip(masters, grads, bucket.slices, strict=True)]
            self._optimizers[name] = FlatOptimizer(config, flat)

    @property
    def description(self) -> str:
        return next(iter(self._optimizers.values())).description

    @property
    def step_count(self) -> int:
        return next(iter(self._optimizers.values())).step_count

    def update(self, name: str, verdict: Verdict) -> None:
        """The stage `update NAME` of a program.  A step that isn't finite changes nothing."""
        bucket = self.buckets[name]
        if verdict.finite:
            self._optimizers[name].step(lr=self.lr, grad_scale=verdict.grad_scale)
            self._to_parameters(name)
        bucket.grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor in the dimensions of the parameter's spec: `exp_avg/NAME` and so on, `master/NAME` where the
        parameters are of lower precision.  A collective with ZeRO-1."""
        out = {}
        for name, bucket in self.buckets.items():
            for kind, slices in self._slices(name).items():
                out.update({f"{kind}/{m.name}": values for m, values in members_of(bucket, gathered(bucket, slices))})
        return out

    def load(self, state: Mapping[str, Tensor], step_count: int) -> None:
        """Take what `state` gave, in any layout with the same parameters on this rank."""
        for name, bucket in self.buckets.items():
            for kind, slices in self._slices(name).items():
                flat = torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.grad.device)
                for member, values in members_of(bucket, flat):
                    values.copy_(state[f"{kind}/{member.name}"])
                scatter(bucket, flat, slices)
            self._optimizers[name].step_count = step_count
            self._to_parameters(name)

    def masters_from_parameters(self) -> None:
        """After the parameters were set from outside."""
        for name, bucket in self.buckets.items():
            scatter(bucket, bucket.param, self._masters[name])

    def _slices(self, name: str) -> dict[str, list[Tensor]]:
        optimizer, bucket = self._optimizers[name], self.buckets[name]
        states = [optimizer.state(i) for i in range(len(bucket.slices))]
        kinds = {kind: [s[kind] for s in states] for kind in (states[0] if states else ())}
        return kinds if bucket.param.dtype == bucket.dtype else kinds | {"master": self._masters[name]}

    def _to_parameters(self, name: str) -> None:
        bucket = self.buckets[name]
        if bucket.param.dtype != bucket.dtype:
            for place, master in zip(bucket.slices, self._masters[name], strict=True):
                bucket.param[place.start : place.stop].copy_(master)
