"""Buckets: gradients, and with ZeRO-1 parameters, in flat memory, so that any piece of them is a slice.

A parameter's `grad` and `main_grad` are views of the bucket: nothing is copied before a reduction.  Gradients are kept
in float32 (float64 for float64 models), also under bfloat16 parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megalina.blocks.bucket_layout import ALIGNMENT, lay_out_bucket
from megalina.blocks.bucket_layout import Member as Declared
from megalina.blocks.optimizers import matrix_flops, optimizer_of
from megalina.config import OptimConfig
from megalina.mesh import Axis
from megalina.model.init import local_shape, spec_of
from megalina.step.passes import cuts
from megalina.step.program import BucketSpec, Matrices

# Elements whose squares are summed in the gradients' own type; what rows of them give is added up in float64.  So a sum's
# relative error is at most that of its worst row, however many there are.
ROW = 2**12


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
    matrices: Matrices | None = None  # it is these, updated as wholes


class Bucket:
    """The parameters of one group.  `axis`: the ranks over which its gradients are summed."""

    def __init__(
        self,
        name: str,
        members: Sequence[tuple[str, nn.Parameter]],
        axis: Axis,
        *,
        sharded: bool,
        piece: int | None,
        optim: OptimConfig,
        tp: Axis,
    ):
        """Memory of its own; `lay_out` puts several side by side.  `optim`: says what is updated as whole matrices; `tp`: the
        ranks that cut some of them."""
        self.name, self.axis, self.tp = name, axis, tp
        self.sharded = sharded and axis.size > 1
        kind = optimizer_of(optim)
        self.layout = lay_out_bucket(
            name,
            [Declared(spec_of(p), local_shape(p), kind.takes_whole(spec_of(p), optim)) for _, p in members],
            ranks=axis.size if self.sharded else 1,
            tp=tp.size if optim.muon_tp == "gather" else 1,
            matrix_work=partial(matrix_flops, config=optim),
        )
        placed = [(*members[i], start) for i, start in zip(self.layout.order, self.layout.starts, strict=True)]
        self.members = [Member(member, p, start, start + p.numel()) for member, p, start in placed]
        self.numel = self.layout.numel
        grain = ALIGNMENT * (axis.size if self.sharded and not self.layout.shares else 1)
        self.piece = None if piece is None else max(grain, piece // grain * grain)
        first = self.members[0].parameter
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.grad = torch.zeros(self.numel, dtype=self.dtype, device=first.device)
        self.param = torch.zeros(self.numel, dtype=first.dtype, device=first.device)
        for m in self.members:
            flat = self.param[m.start : m.stop]
            flat.copy_(m.parameter.detach().flatten())
            m.parameter.data = flat.view(m.parameter.shape)
        self._put_gradients()
        self.slices = self.slices_of_own()

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
        return BucketSpec(self.numel, self.axis.name, self.sharded, self.piece, self.layout.matrices, self.layout.shares)

    @property
    def pieces(self) -> Sequence[tuple[int, int]]:
        return cuts(self.numel, self.piece)

    def own(self, piece: tuple[int, int]) -> slice:
        """This rank's share of a piece."""
        start, stop = self.parts(piece)[self.axis.rank] if self.sharded else piece
        return slice(start, stop)

    def parts(self, piece: tuple[int, int]) -> Sequence[tuple[int, int]]:
        """Each rank's share of a piece, where there are shares; uneven where they are whole matrices."""
        start, stop = piece
        if self.layout.shares:
            return [(min(max(start, a), stop), min(max(start, b), stop)) for a, b in self.layout.shares]
        width = (stop - start) // self.axis.size
        return [(start + rank * width, start + (rank + 1) * width) for rank in range(self.axis.size)]

    def non_finite(self) -> list[str]:
        """The parameters whose gradients here are not finite."""
        return [m.name for m in self.members if not self.grad[m.start : m.stop].isfinite().all()]

    def square_sum(self) -> Tensor:
        """Sum of squares of this rank's gradients, float64, so that the sum over the world counts each element once."""
        norms = [torch.linalg.vector_norm(rows, dim=1) for s in self.slices for rows in _rows(self.grad[s.start : s.stop])]
        norm = torch.cat(norms).double() if norms else self.grad.new_zeros(1, dtype=torch.float64)
        total = torch.dot(norm, norm)
        # under tp and ep the other ranks hold other elements; along the bucket's own axis they hold the same ones
        return total if self.sharded else total / self.axis.size

    def slices_of_own(self) -> list[FlatSlice]:
        """What this rank updates."""
        return list(self._own_slices())

    def _own_slices(self) -> Iterator[FlatSlice]:
        """Whole matrices first, of each parameter by themselves; then the rest, piece by piece."""
        layout = self.layout
        for matrices in self.spec.own_matrices(self.axis.rank):
            yield FlatSlice(matrices.start, matrices.stop, True, matrices)
        for piece in self.pieces:
            own = self.own(piece)
            start = min(max(layout.matrix_stop, own.start), own.stop)
            middle = min(max(layout.decay_stop, start), own.stop)
            if start < middle:
                yield FlatSlice(start, middle, True)
            if middle < own.stop:
                yield FlatSlice(middle, own.stop, False)


def _rows(flat: Tensor) -> Iterator[Tensor]:
    """[n, ROW], and what is left over."""
    whole = flat.numel() // ROW * ROW
    if whole:
        yield flat[:whole].view(-1, ROW)
    if whole < flat.numel():
        yield flat[whole:].view(1, -1)


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
