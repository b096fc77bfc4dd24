"""Exchanges: what goes on the wire, each as a start and a wait.

Without a group there is nobody to talk to: the value itself is what arrives.  A `Pending` keeps its buffers alive until
it is awaited, and drops them then.  Each collective enters the caller's log as it is submitted.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from megalina.collective_log import CollectiveLog
from megalina.groups import is_gloo
from megalina.mesh import Axis

# Gloo gathers and sums in a ring, rank by rank.  What is as small as this is sent to everybody at once: one way's time instead of
# as many as there are other ranks, or of twice as many.
DIRECT_BYTES = 16 * 1024
MESSAGE = "message"  # from one of an axis's two ranks to the other


class Awaited(Protocol):
    """What there is to know of something on the wire: of a collective `dist.Work`."""

    def wait(self) -> Any: ...

    def get_future(self) -> Any: ...

    def is_completed(self) -> bool: ...


class Pending:
    """Something on the wire."""

    __slots__ = ("_finish", "num_bytes", "work")

    def __init__(self, work: Awaited | None, finish: Callable[[], Tensor], num_bytes: int = 0):
        self.work: Awaited | None = work
        self._finish: Callable[[], Tensor] | None = finish
        self.num_bytes = num_bytes  # what this rank sends to others (of an all-to-all gets, if that is more); of a sum its value

    def wait(self) -> Tensor:
        """What arrived.  On CUDA the current stream waits, not the host."""
        assert self._finish is not None, "awaited twice"
        if self.work is not None:
            self.work.wait()
        out = self._finish()
        self.work = self._finish = None
        return out


def start_all_to_all(x: Tensor, send: list[int], receive: list[int], axis: Axis, log: CollectiveLog) -> Pending:
    """Rows `x` [sum(send), ...], the next `send[r]` of them to rank r of the axis; arrives as [sum(receive), ...]."""
    if axis.group is None:
        return Pending(None, lambda: x)
    x = x.contiguous()
    out = x.new_empty(sum(receive), *x.shape[1:])
    enter(log, "all-to-all", x, axis, send, receive)
    work = dist.all_to_all_single(out, x, receive, send, group=axis.group, async_op=True)
    busiest_way = max(len(x), len(out)) - send[axis.rank]  # rows; what it keeps is in both
    num_bytes = busiest_way * x.element_size() * math.prod(x.shape[1:])
    return Pending(work, lambda keep=x: out, num_bytes)  # type: ignore[misc]


def start_even(x: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """[size x n, ...]: the r-th [n, ...] goes to rank r of the axis; arrives as [size x n, ...], from rank after rank."""
    even = [len(x) // axis.size] * axis.size
    return start_all_to_all(x, even, even, axis, log)


def start_gather(x: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """[n, ...] of each rank, arrives as [size x n, ...]."""
    if axis.group is None:
        return Pending(None, lambda: x)
    x = x.contiguous()
    num_bytes = x.nbytes
    out = x.new_empty(len(x) * axis.size, *x.shape[1:])
    enter(log, "gather", x, axis)
    if x.nbytes <= DIRECT_BYTES and is_gloo(axis.group):
        x = x.repeat(axis.size, *[1] * (x.dim() - 1))
        work = dist.all_to_all_single(out, x, group=axis.group, async_op=True)
    else:
        work = _all_gather(out, x, group=axis.group, async_op=True)
    return Pending(work, lambda keep=x: out, num_bytes)  # type: ignore[misc]


def start_scatter(x: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """The sum of all ranks' [size x n, ...], of which rank r gets the r-th [n, ...]."""
    if axis.group is None:
        return Pending(None, lambda: x)
    x = x.contiguous()
    enter(log, "scatter", x, axis)
    if is_gloo(axis.group):  # its reduce-scatter costs a whole all-reduce
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, group=axis.group, async_op=True)
        return Pending(work, lambda keep=x: parts.view(axis.size, -1, *x.shape[1:]).sum(0), x.nbytes)  # type: ignore[misc]
    out = x.new_empty(len(x) // axis.size, *x.shape[1:])
    work = _reduce_scatter(out, x, group=axis.group, async_op=True)
    return Pending(work, lambda keep=x: out, x.nbytes)  # type: ignore[misc]


def start_send(x: Tensor, name: str, axis: Axis, log: CollectiveLog) -> Pending:
    """`x` [n, ...] to the other of the axis's two ranks, which calls `start_receive` with the same name of a wire."""
    x = x.contiguous()
    other = _other(axis)
    rows = [0, 0]
    rows[1 - axis.rank] = len(x)
    enter(log, MESSAGE, x, axis, rows, [0, 0])
    work = dist.isend(x, other, group=axis.group, tag=_tag(name))
    return Pending(work, lambda keep=x: keep, x.nbytes)  # type: ignore[misc]


def start_receive(out: Tensor, name: str, axis: Axis, log: CollectiveLog) -> Pending:
    """[n, ...] of the other of the axis's two ranks, into `out`."""
    rows = [0, 0]
    rows[1 - axis.rank] = len(out)
    enter(log, MESSAGE, out, axis, [0, 0], rows)
    work = dist.irecv(out, _other(axis), group=axis.group, tag=_tag(name))
    return Pending(work, lambda: out)


def _other(axis: Axis) -> int:
    return axis.ranks[1 - axis.rank]


def _tag(name: str) -> int:
    """Of a wire, `x>.3.0` where it begins and `x<.3.0` where it ends: gloo gives a message to nobody who asks for another, so a
    mix-up stands still instead of going unnoticed.  (NCCL has no tags.)"""
    return crc32(name.replace(">", "").replace("<", "").encode()) & 0x7FFFFFFF


def start_sum(x: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """The sum over the ranks of the axis; `x` is left as it is."""
    if axis.group is None:
        return Pending(None, lambda: x)
    enter(log, "sum", x, axis)
    if _is_direct(x, axis):
        work, of_ranks = _of_everybody(x, axis)
        return Pending(work, lambda: of_ranks.sum(0, dtype=x.dtype).view(x.shape), x.nbytes)
    out = x.clone(memory_format=torch.contiguous_format)
    return Pending(dist.all_reduce(out, group=axis.group, async_op=True), lambda: out, out.nbytes)


def start_max(x: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """The largest over the ranks of the axis, element by element; `x` is left as it is."""
    if axis.group is None:
        return Pending(None, lambda: x)
    enter(log, "max", x, axis)
    if _is_direct(x, axis):
        work, of_ranks = _of_everybody(x, axis)
        return Pending(work, lambda: of_ranks.amax(0).view(x.shape), x.nbytes)
    out = x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(out, op=dist.ReduceOp.MAX, group=axis.group, async_op=True)
    return Pending(work, lambda: out, out.nbytes)


def _is_direct(x: Tensor, axis: Axis) -> bool:
    """Whether gloo had better send it to everybody; between two ranks a ring is that already."""
    return 0 < x.nbytes <= DIRECT_BYTES and axis.size > 2 and is_gloo(axis.group)


def _of_everybody(x: Tensor, axis: Axis) -> tuple[dist.Work, Tensor]:
    """Arrives as [size, elements], of all ranks in their order: what is made of it has the same bits on each."""
    copies = x.reshape(1, -1).repeat(axis.size, 1)
    out = torch.empty_like(copies)
    return dist.all_to_all_single(out, copies, group=axis.group, async_op=True), out


def start_sum_in_place(flat: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """`flat` becomes its sum over the ranks of the axis."""
    if axis.group is None:
        return Pending(None, lambda: flat)
    enter(log, "sum", flat, axis)
    return Pending(dist.all_reduce(flat, group=axis.group, async_op=True), lambda: flat, flat.nbytes)


def start_scatter_in_place(flat: Tensor, own: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """`own`, this rank's part of `flat`, becomes its sum over the ranks of the axis; the other parts are then void."""
    pending = start_scatter(flat, axis, log)
    if axis.group is None:
        return pending
    return Pending(pending.work, lambda: own.copy_(pending.wait()), pending.num_bytes)


def start_gather_in_place(flat: Tensor, own: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """`flat` is filled with every rank's `own` part."""
    if axis.group is None:
        return Pending(None, lambda: flat)
    mine = own.clone()
    enter(log, "gather", mine, axis)
    work = _all_gather(flat, mine, group=axis.group, async_op=True)
    return Pending(work, lambda keep=mine: flat, mine.nbytes)  # type: ignore[misc]


def start_uneven_gather(x: Tensor, sizes: list[int], axis: Axis, log: CollectiveLog) -> Pending:
    """[sizes[r]] of each rank r of the axis, this one's `x` among them; arrives as [sum(sizes)].  Ranks of other rows of the mesh
    may have other sizes."""
    if axis.group is None:
        return Pending(None, lambda: x)
    return _to_everybody(x, sizes, x.new_empty(sum(sizes)), axis, log)


def start_uneven_gather_in_place(flat: Tensor, own: Tensor, sizes: list[int], axis: Axis, log: CollectiveLog) -> Pending:
    """`flat` is filled with every rank's `own` part, of which rank r's has `sizes[r]` elements."""
    if axis.group is None:
        return Pending(None, lambda: flat)
    if is_gloo(axis.group):  # which gathers equal parts alone
        return _to_everybody(own, sizes, flat, axis, log)
    mine = own.clone()
    enter(log, "gather", flat, axis)
    work = dist.all_gather(list(flat.split(sizes)), mine, group=axis.group, async_op=True)
    return Pending(work, lambda keep=mine: flat, mine.nbytes)  # type: ignore[misc]


def start_uneven_scatter_in_place(flat: Tensor, own: Tensor, sizes: list[int], axis: Axis, log: CollectiveLog) -> Pending:
    """`own`, this rank's part of `flat`, becomes its sum over the ranks of the axis; rank r's part has `sizes[r]` elements, and
    the other parts are then void."""
    if axis.group is None:
        return Pending(None, lambda: flat)
    if is_gloo(axis.group):
        even = [len(own)] * axis.size
        parts = flat.new_empty(len(own) * axis.size)
        enter(log, "all-to-all", flat, axis, sizes, even)
        work = dist.all_to_all_single(parts, flat, even, sizes, group=axis.group, async_op=True)

        def summed(keep: Tensor = flat) -> Tensor:
            return own.copy_(parts.view(axis.size, len(own)).sum(0))

        return Pending(work, summed, flat.nbytes)
    out = torch.empty_like(own)
    enter(log, "scatter", flat, axis)
    work = dist.reduce_scatter(out, list(flat.split(sizes)), group=axis.group, async_op=True)
    return Pending(work, lambda keep=flat: own.copy_(out), flat.nbytes)  # type: ignore[misc]


def _to_everybody(x: Tensor, sizes: list[int], out: Tensor, axis: Axis, log: CollectiveLog) -> Pending:
    """An all-gather by all-to-all.  `x` may be a part of `out`, [sum(sizes)]."""
    send, even = x.repeat(axis.size), [len(x)] * axis.size
    enter(log, "all-to-all", send, axis, even, sizes)
    work = dist.all_to_all_single(out, send, sizes, even, group=axis.group, async_op=True)
    return Pending(work, lambda keep=send: out, x.nbytes)  # type: ignore[misc]


def enter(log: CollectiveLog, kind: str, x: Tensor, axis: Axis, send: Sequence[int] = (), receive: Sequence[int] = ()) -> None:
    """All-to-alls and messages have sizes of their own on each rank, all else has equal ones."""
    count = None if kind in ("all-to-all", MESSAGE) else len(x)
    log.submit(axis.log_name, axis.ranks, kind, str(x.dtype), x.shape[1:], count, send, receive)


# torch 2.13 renamed both; older ones have only the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
