"""The optimizer of all buckets: updates one when its instruction comes, and knows its state by parameter for checkpoints."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megalina.blocks.optimizers import optimizer_of
from megalina.comm.slice import Slice
from megalina.config import OptimConfig
from megalina.model.init import local_shape, spec_of
from megalina.parallel.buckets import Bucket, Member
from megalina.parallel.step_result import StepResult
from megalina.train.optim import FlatOptimizer, FlatTensor


class BucketOptimizer:
    """Under bfloat16 parameters it holds float32 master weights of this rank's slices; else the parameters are them."""

    def __init__(self, config: OptimConfig, buckets: Mapping[str, Bucket]):
        self.lr = config.lr  # the trainer sets it before each step
        self.config, self.buckets = config, buckets
        self._masters: dict[str, list[Tensor]] = {}
        self._optimizers: dict[str, FlatOptimizer] = {}
        for name, bucket in buckets.items():
            masters = [bucket.param[s.start : s.stop] for s in bucket.slices]
            if bucket.param.dtype != bucket.dtype:
                masters = [m.to(bucket.dtype) for m in masters]
            self._masters[name] = masters
            grads = [bucket.grad[s.start : s.stop] for s in bucket.slices]
            flat = [FlatTensor(m, g, s.decay, s.matrices) for m, g, s in zip(masters, grads, bucket.slices, strict=True)]
            self._optimizers[name] = FlatOptimizer(config, flat, tp=bucket.tp)

    @property
    def description(self) -> str:
        return next(iter(self._optimizers.values())).description

    @property
    def step_count(self) -> int:
        """Updates so far; skipped steps don't count."""
        return next(iter(self._optimizers.values())).step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        for optimizer in self._optimizers.values():
            optimizer.step_count = value

    def send(self, name: str, scale: float | None) -> Tensor:
        """The instruction `momentum NAME`: as `megalina.parallel.step_result.Directions` says."""
        matrices = self._optimizers[name].matrices
        return self.buckets[name].grad.new_empty(0) if matrices is None else matrices.send(scale)

    def direct(self, name: str, scale: float | None, gathered: Tensor | None) -> None:
        """The instruction `newton_schulz NAME`."""
        if (matrices := self._optimizers[name].matrices) is not None:
            matrices.direct(scale, gathered)

    def update(self, name: str, result: StepResult) -> None:
        """The instruction `update NAME` of a program.  A step that isn't finite, or that the guard refuses, changes nothing."""
        bucket, optimizer = self.buckets[name], self._optimizers[name]
        if result.updates:
            optimizer.step(lr=self.lr, grad_scale=result.grad_scale)
            if result.head_logits is not None:
                self._clip_heads(name, result.head_logits)
            self._to_parameters(name)
        elif optimizer.matrices is not None:
            optimizer.matrices.forget()
        bucket.grad.zero_()

    @torch.no_grad()
    def _clip_heads(self, name: str, logits_LG: Tensor) -> None:
        """QK-clip (Kimi K2, arXiv:2507.20534, section 2.1): rows of queries and keys are scaled as if the largest logit of their
        group of heads had been the threshold, where it was more.  Of the slices that are here, which have whole rows."""
        bucket, config = self.buckets[name], self.config
        powers = {"q": config.qk_clip_alpha, "k": 1 - config.qk_clip_alpha, "both": 1.0, "none": 0.0}
        for m in bucket.members:
            if not (pattern := spec_of(m.parameter).clip):
                continue
            logit_G = logits_LG[int(m.name.split(".")[1])]
            factor_G = (config.qk_clip / logit_G.clamp(min=config.qk_clip)).to(bucket.dtype)
            factor_R = torch.cat([factor_G.pow(powers[how]).expand(rows, -1) for rows, how in pattern]).T.reshape(-1)
            width = m.parameter.numel() // len(factor_R)
            for place, master in zip(bucket.slices, self._masters[name], strict=True):
                start, stop = max(place.start, m.start), min(place.stop, m.stop)
                if start < stop:
                    own = slice((start - m.start) // width, (stop - m.start) // width)
                    master[start - place.start : stop - place.start].view(-1, width).mul_(factor_R[own, None])

    def slices(self) -> dict[str, Sequence[Slice]]:
        """What this rank holds of the state, by name: `exp_avg/PARAMETER` and so on, `master/PARAMETER` where the
        parameters are of lower precision.  Views: what is read into them is the state."""
        held: dict[str, list[Slice]] = {}
        optimizer = optimizer_of(self.config)
        for name, bucket in self.buckets.items():
            states = [dict(self._optimizers[name].state(i)) for i in range(len(bucket.slices))]
            masters = ["master"] if bucket.param.dtype != bucket.dtype else []
            for state, master in zip(states, self._masters[name], strict=True):
                state |= dict.fromkeys(masters, master)
            for m in bucket.members:
                for kind in [*optimizer.states_of(spec_of(m.parameter), self.config), *masters]:
                    held[f"{kind}/{m.name}"] = list(_pieces(bucket, m, kind, states))
        out: dict[str, Sequence[Slice]] = {**held}
        return out

    def masters_from_parameters(self) -> None:
        """After the parameters were set from outside."""
        for name, bucket in self.buckets.items():
            for place, master in zip(bucket.slices, self._masters[name], strict=True):
                master.copy_(bucket.param[place.start : place.stop])

    def _to_parameters(self, name: str) -> None:
        bucket = self.buckets[name]
        if bucket.param.dtype != bucket.dtype:
            for place, master in zip(bucket.slices, self._masters[name], strict=True):
                bucket.param[place.start : place.stop].copy_(master)


def _pieces(bucket: Bucket, m: Member, kind: str, states: Sequence[Mapping[str, Tensor]]) -> Iterator[Slice]:
    """The parts of a parameter's state that this rank's slices of a bucket hold; an empty one where they hold nothing of it, so
    that every rank knows of every parameter of its buckets."""
    spec, shape = spec_of(m.parameter), local_shape(m.parameter)
    length = {0: spec.rows} if spec.rows else {}
    found = [
        (start - m.start, states[i][kind][start - place.start : stop - place.start])
        for i, place in enumerate(bucket.slices)
        if (start := max(place.start, m.start)) < (stop := min(place.stop, m.stop))
    ]
    for start, values in found or [(0, bucket.grad.new_empty(0))]:
        yield Slice(values, spec.sharded, shape=shape, start=start, order=spec.order, length=length)
