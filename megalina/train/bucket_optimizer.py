"""The optimizer of all buckets: updates one when its instruction comes, and knows its state by parameter for checkpoints."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from megalina.comm.slice import Slice
from megalina.config import OptimConfig
from megalina.model.init import local_shape, spec_of
from megalina.parallel.buckets import Bucket
from megalina.parallel.step_result import StepResult
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
        """Updates so far; skipped steps don't count."""
        return next(iter(self._optimizers.values())).step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        for optimizer in self._optimizers.values():
            optimizer.step_count = value

    def update(self, name: str, result: StepResult) -> None:
        """The instruction `update NAME` of a program.  A step that isn't finite, or that the guard refuses, changes nothing."""
        bucket = self.buckets[name]
        if result.updates:
            self._optimizers[name].step(lr=self.lr, grad_scale=result.grad_scale)
            self._to_parameters(name)
        bucket.grad.zero_()

    def slices(self) -> dict[str, Sequence[Slice]]:
        """What this rank holds of the state, by name: `exp_avg/PARAMETER` and so on, `master/PARAMETER` where the
        parameters are of lower precision.  Views: what is read into them is the state."""
        held: dict[str, list[Slice]] = {}
        for name, bucket in self.buckets.items():
            states = [dict(self._optimizers[name].state(i)) for i in range(len(bucket.slices))]
            if bucket.param.dtype != bucket.dtype:
                for state, master in zip(states, self._masters[name], strict=True):
                    state["master"] = master
            for i, state in enumerate(states):
                for kind, flat in state.items():
                    for parameter, piece in _pieces(bucket, i, flat):
                        held.setdefault(f"{kind}/{parameter}", []).append(piece)
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


def _pieces(bucket: Bucket, index: int, flat: Tensor) -> Iterator[tuple[str, Slice]]:
    """The parts of parameters that one of this rank's slices of a bucket holds; one that holds nothing of a parameter gives
    an empty piece, so that every rank knows of every parameter of its buckets."""
    place = bucket.slices[index]
    for m in bucket.members:
        spec = spec_of(m.parameter)
        start, stop = max(place.start, m.start), min(place.stop, m.stop)
        if start >= stop:
            start = stop = m.start
            values = flat[:0]
        else:
            values = flat[start - place.start : stop - place.start]
        length = {0: spec.rows} if spec.rows else {}
        shape = local_shape(m.parameter)
        yield m.name, Slice(values, spec.sharded, shape=shape, start=start - m.start, order=spec.order, length=length)
