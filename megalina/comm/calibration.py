"""A calibration: how long exchanges of tokens and of gradients take that have the links to themselves.

All ranks make the same exchanges in the same order, one at a time, on quiet links.  Each counts with the shortest time over
the ranks of its group, as in `megalina.comm.slowdowns`: who came last waited for nobody.  Of its repeats the median counts, as
ranks don't meet to the millisecond before an exchange of a step either, and that matters: gloo's word that a rank is ready to
receive travels behind what it sends, so of two ranks the later one takes up to twice as long (measured with 0.5 MB on emulated
links of 500 Mbit/s: 8 ms where a barrier came first, 14 ms where each rank had slept for as long).  So there is no barrier,
but a pause of at least the exchange's own time, that none may start beside the end of the one before.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from megalina.collective_log import CollectiveLog
from megalina.comm import exchange
from megalina.comm.by_node import Relay, start_gather_by_node, start_scatter_by_node, start_sum_by_node
from megalina.comm.exchange import Pending
from megalina.mesh import Axis, Mesh, all_gather_object
from megalina.timeline.contention import CALIBRATED_AXIS, Alone
from megalina.timeline.recorder import SEND, Event

ELEMENT_BYTES = 4
PAUSE_S = 0.005  # the shortest before an exchange
MOST_BYTES = 2**22  # a line holds beyond it, and larger ones would take long on a slow link


def calibrate(
    mesh: Mesh, log: CollectiveLog, sizes_bytes: Mapping[str, Sequence[int]], repeats: int = 5, *, sharded: bool = False
) -> dict[str, Alone]:
    """A line for each op in `sizes_bytes`: "tokens" (all-to-all on ep), "grads" (all-reduce on dp; with `sharded`
    reduce-scatter), "params" (all-gather on dp).  Sizes are meant as `Event.num_bytes` is, and should be near a step's.

    The same on every rank; all must call it, with equal arguments.  Of several groups the slowest counts.
    An op whose axis has one rank takes no time: Alone(0, 0)."""
    axes = {op: getattr(mesh, CALIBRATED_AXIS[op]) for op in sizes_bytes}
    own: dict[str, list[tuple[int, list[float]]]] = {}  # op -> bytes and seconds of each size
    relay = Relay()
    for op, axis in axes.items():
        if axis.group is not None:
            own[op] = [_timed(_exchange(op, size, axis, log, relay, sharded), mesh, repeats) for size in sizes_bytes[op]]
    relay.close()
    everybody = all_gather_object(mesh, own)
    out = {}
    for op, axis in axes.items():
        groups = [[everybody[rank][op] for rank in row] for row in mesh.rows[axis.name]] if axis.group is not None else []
        points = []
        for i in range(len(sizes_bytes[op]) if groups else 0):
            alone_s = [statistics.median(map(min, zip(*(of_rank[i][1] for of_rank in group), strict=True))) for group in groups]
            points.append((own[op][i][0], max(alone_s)))
        out[op] = fit(points)
    return out


def fastest(
    first: Mapping[str, Alone], second: Mapping[str, Alone], sizes_bytes: Mapping[str, Sequence[int]]
) -> dict[str, Alone]:
    """Of two calibrations with the same sizes, for each op the one that was faster over all sizes: a machine that has other
    work for a while spoils one of them, hardly both."""

    def over_sizes_s(alone: Alone, op: str) -> float:
        return sum(alone.seconds(size) for size in sizes_bytes[op])

    return {op: min(first[op], second[op], key=lambda alone: over_sizes_s(alone, op)) for op in sizes_bytes}


def sizes_of_step(mesh: Mesh, events: Sequence[Event]) -> dict[str, list[int]]:
    """For `calibrate`: the smallest, the middle and the largest of what a step sends, at most MOST_BYTES.

    The same on every rank; all must call it, each with its own events of the same step."""
    own = {
        op: [e.num_bytes for e in events if (e.kind, e.op, e.axis) == (SEND, op, axis) and e.num_bytes]
        for op, axis in CALIBRATED_AXIS.items()
    }
    out = {}
    for op in CALIBRATED_AXIS:
        sizes = sorted(size for rank in all_gather_object(mesh, own[op]) for size in rank)
        if sizes:
            smallest, middle, largest = (min(MOST_BYTES, sizes[i]) for i in (0, len(sizes) // 2, -1))
            out[op] = sorted({min(smallest, largest // 2), middle, largest})
    return out


def fit(points: Sequence[tuple[int, float]]) -> Alone:
    """The least-squares line through (bytes, seconds) that nowhere falls and nowhere is negative."""
    if not points:
        return Alone(0.0, 0.0)
    sizes, times_s = zip(*points, strict=True)
    if len(set(sizes)) == 1:
        return Alone(0.0, statistics.fmean(times_s) / sizes[0]) if sizes[0] else Alone(statistics.fmean(times_s), 0.0)
    slope, latency_s = statistics.linear_regression(sizes, times_s)
    if latency_s < 0:
        slope, latency_s = statistics.linear_regression(sizes, times_s, proportional=True)
    if slope < 0:
        slope, latency_s = 0.0, statistics.fmean(times_s)
    return Alone(latency_s, slope)


def _timed(start: Callable[[], Pending], mesh: Mesh, repeats: int) -> tuple[int, list[float]]:
    """Bytes that this rank sends in one exchange, and how long each took.  A first one, to warm up, isn't among them."""
    cuda = dist.get_backend(mesh.world.group) == "nccl"
    times_s, pause_s = [], PAUSE_S
    all_gather_object(mesh, None)  # all are through with what came before
    for _ in range(repeats + 1):
        time.sleep(pause_s)
        if cuda:
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        pending = start()
        num_bytes = pending.num_bytes
        pending.wait()
        if cuda:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - started_s)
        pause_s = max(PAUSE_S, times_s[-1])
    return num_bytes, times_s[1:]


def _exchange(op: str, num_bytes: int, axis: Axis, log: CollectiveLog, relay: Relay, sharded: bool) -> Callable[[], Pending]:
    """What starts it, with buffers made beforehand."""
    device, ranks, count = "cuda" if dist.get_backend(axis.group) == "nccl" else "cpu", axis.size, num_bytes // ELEMENT_BYTES
    if op == "tokens":
        part = [max(1, count // (ranks - 1))] * ranks  # what it keeps is not sent
        rows_N = torch.zeros(sum(part), device=device)
        return lambda: exchange.start_all_to_all(rows_N, part, part, axis, log)
    if op == "params":
        own = torch.zeros(max(1, count), device=device)
        if axis.nodes is not None:
            whole, even = own.repeat(ranks), [len(own)] * ranks
            return lambda: start_gather_by_node(whole, own, even, axis, log, relay)
        return lambda: exchange.start_gather(own, axis, log)
    flat = torch.zeros(max(1, count // ranks) * ranks, device=device)
    if axis.nodes is not None:
        share, parts = flat[: len(flat) // ranks].clone(), [len(flat) // ranks] * ranks
        if sharded:
            return lambda: start_scatter_by_node(flat, share, parts, axis, log, relay)
        return lambda: start_sum_by_node(flat, axis, log, relay)
    return lambda: exchange.start_scatter(flat, axis, log) if sharded else exchange.start_sum_in_place(flat, axis, log)
