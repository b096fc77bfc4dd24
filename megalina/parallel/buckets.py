"""Buckets: gradients, and with ZeRO-1 parameters, in flat memory, so that any piece of them is a slice.

A parameter's `grad` and `main_grad` are views of the bucket: nothing is copied before a reduction.  Gradients are kept
in float32 (float64 for float64 models), also under bfloat16 parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalina.mesh import Axis
from megalina.model.init import spec_of
from megalina.step.passes import cuts
from megalina.step.program import BucketSpec

ALIGNMENT = 16  # elements; grouped matrix products want rows at multiples of 16 bytes
# Elements whose squares are summed in the gradients' own type, by one dot product; blocks are added up in float64.  So a sum's
# relative error is at most that of its worst block, however many there are.  Measured with 1e8 float32 numbers on the CPU: 1e-6
# (normal, uniform) to 3e-5 (all equal, log-normal); by one dot product over all of them 6e-4 to 2e-2.  cuBLAS has 32-bit sizes.
BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter's place in its bucket."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class FlatSlice:
    """A contiguous part of a bucket that this rank updates."""

    start: int
    stop: int
    decay: bool  # weight decay applies to all of it


class Bucket:
    """The parameters of one group.  `axis`: the ranks over which its gradients are summed."""

    def __init__(self, name: str, members: Sequence[tuple[str, nn.Parameter]], axis: Axis, *, sharded: bool, piece: int | None):
        """Memory of its own; `lay_out` puts several side by side."""
        self.name, self.axis = name, axis
        self.sharded = sharded and axis.size > 1
        decayed_first = sorted(members, key=lambda m: not spec_of(m[1]).decay)
        self.members: list[Member] = []
        stop = decayed = 0
        for member, p in decayed_first:
            start, stop = stop, stop + p.numel()
            self.members.append(Member(member, p, start, stop))
            stop = -(-stop // ALIGNMENT) * ALIGNMENT
            if spec_of(p).decay:
                decayed = stop
        grain = ALIGNMENT * (axis.size if self.sharded else 1)  # every piece must fall into equal shares
        self.numel = -(-stop // grain) * grain
        self.piece = None if piece is None else max(grain, piece // grain * grain)
        first = decayed_first[0][1]
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.grad = torch.zeros(self.numel, dtype=self.dtype, device=first.device)
        self.param = torch.zeros(self.numel, dtype=first.dtype, device=first.device)
        for m in self.members:
            flat = self.param[m.start : m.stop]
            flat.copy_(m.parameter.detach().flatten())
            m.parameter.data = flat.view(m.parameter.shape)
        self._put_gradients()
        self.slices = list(self._own_slices(decayed))

    def use(self, grad: Tensor) -> None:
        """From now on the gradients are in this memory, [numel], zeros."""
        self.grad = grad
        self._put_gradients()

    def _put_gradients(self) -> None:
        for m in self.members:
            grad = self.grad[m.start : m.stop].view(m.parameter.shape)
            if m.parameter.dtype != self.dtype:
                m.parameter.grad_dtype = self.dtype
            m.parameter.grad = grad
            m.parameter.main_grad = grad  # type: ignore[attr-defined]

    @property
    def spec(self) -> BucketSpec:
        return BucketSpec(self.numel, self.axis.name, self.sharded, self.piece)

    @property
    def pieces(self) -> Sequence[tuple[int, int]]:
        return cuts(self.numel, self.piece)

    def own(self, piece: tuple[int, int]) -> slice:
        """This rank's share of a piece."""
        start, stop = piece
        if not self.sharded:
            return slice(start, stop)
        width = (stop - start) // self.axis.size
        return slice(start + self.axis.rank * width, start + (self.axis.rank + 1) * width)

    def non_finite(self) -> list[str]:
        """The parameters whose gradients here are not finite."""
        return [m.name for m in self.members if not self.grad[m.start : m.stop].isfinite().all()]

    def square_sum(self) -> Tensor:
        """Sum of squares of this rank's gradients, float64, so that the sum over the world counts each element once."""
        total = torch.zeros((), dtype=torch.float64, device=self.grad.device)
        for s in self.slices:
            for own in self.grad[s.start : s.stop].split(BLOCK):
                total += torch.dot(own, own)
        # under tp and ep the other ranks hold other elements; along the bucket's own axis they hold the same ones
        return total if self.sharded else total / self.axis.size

    def _own_slices(self, decayed: int) -> Iterator[FlatSlice]:
        for piece in self.pieces:
            own = self.own(piece)
            middle = min(max(decayed, own.start), own.stop)
            if own.start < middle:
                yield FlatSlice(own.start, middle, True)
            if middle < own.stop:
                yield FlatSlice(middle, own.stop, False)


def lay_out(buckets: Sequence[Bucket]) -> None:
    """Put the gradients of buckets side by side, those of one axis and type in the order given, so that neighbours can be
    summed as one."""
    rows: dict[tuple[str, torch.dtype], list[Bucket]] = {}
    for bucket in buckets:
        rows.setdefault((bucket.axis.name, bucket.dtype), []).append(bucket)
    for row in rows.values():
        flat = torch.zeros(sum(b.numel for b in row), dtype=row[0].dtype, device=row[0].grad.device)
        for bucket, grad in zip(row, flat.split([b.numel for b in row]), strict=True):
            bucket.use(grad)


def side_by_side(buckets: Sequence[Bucket]) -> Tensor:
    """The gradients of buckets that `lay_out` put next to each other, as one."""
    first = buckets[0].grad
    starts = [b.grad.storage_offset() for b in buckets]
    assert all(
        b.grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and start + b.numel == following
        for b, start, following in zip(buckets, starts, [*starts[1:], starts[-1] + buckets[-1].numel], strict=True)
    ), [b.name for b in buckets]
    return first.as_strided((sum(b.numel for b in buckets),), (1,), first.storage_offset())
