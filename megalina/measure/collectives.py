"""Collectives as calls of the trainer's own exchanges, and how they are timed: with the wire to themselves, and beside others.

As in `megalina/comm/calibration.py` a collective counts with the shortest time over the ranks of its group, since who comes last
waited for nobody; of its repeats the median counts, and of several groups that send side by side the slowest.

Contention is how much longer one takes while another group's are on the wire.  A large one is started in the background, and some
small ones of the other group are made one after another.  A small one counts where the large one was not done on any rank when it
ended, with the smallest time over the ranks, against the same row of small ones without the large one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megalina.collective_log import CollectiveLog
from megalina.comm import exchange
from megalina.comm.exchange import Pending
from megalina.layout import rows
from megalina.mesh import Axis, Mesh, all_gather_object, build_mesh
from megalina.perfmodel.sim.collectives import Collective
from megalina.timeline.contention import quantile

REPEATS = 15
PAUSE_S = 0.001  # at least, before each; the core computes meanwhile, as it does in a step
ELEMENT_BYTES = 4
FOREGROUND_BYTES = 2**18
SMALL_ONES = 4  # under each large one, which would take so many times as long alone
ROUNDS = 12
MOST_BACKGROUND_BYTES = 2**28


def groups_of(*, world: int, ranks_per_node: int) -> dict[str, tuple[Mesh, str]]:
    """Meshes and their axes whose rows lie inside nodes ("inside") and have one rank of each node ("over"); all ranks call it.

    Ranks are numbered node by node."""
    found: dict[str, tuple[Mesh, str]] = {}
    if world == 1:
        return found
    mesh = build_mesh(ep=ranks_per_node)
    if ranks_per_node > 1:
        found["inside"] = mesh, "ep"
    if world > ranks_per_node:
        found["over"] = mesh, "edp"
    return found


def started(what: Collective, num_bytes: int, axis: Axis, device: torch.device) -> Callable[[], Pending]:
    """What starts it, for a whole tensor of `num_bytes`, with buffers made beforehand.  It is logged, as that is part of its
    price; nobody reads the log."""
    log = CollectiveLog(axis.ranks[axis.rank])
    part = max(1, num_bytes // ELEMENT_BYTES // axis.size)
    whole = torch.zeros(part * axis.size, device=device)
    if what is Collective.ALL_TO_ALL:
        return lambda: exchange.start_all_to_all(whole, [part] * axis.size, [part] * axis.size, axis, log)
    if what is Collective.ALL_REDUCE:
        return lambda: exchange.start_sum_in_place(whole, axis, log)
    if what is Collective.REDUCE_SCATTER:
        return lambda: exchange.start_scatter(whole, axis, log)
    own = torch.zeros(part, device=device)
    return lambda: exchange.start_gather(own, axis, log)


def collective_s(what: Collective, num_bytes: int, mesh: Mesh, axis_name: str, device: torch.device) -> float:
    """The same on every rank; all call it together."""
    start = started(what, num_bytes, getattr(mesh, axis_name), device)
    all_gather_object(mesh, None)  # all are through with what came before
    times_s, pause_s = [], PAUSE_S
    for _ in range(REPEATS + 1):
        compute_for(pause_s, device)
        times_s.append(timed(start, device))
        pause_s = max(PAUSE_S, times_s[-1])
    everybody = all_gather_object(mesh, times_s[1:])
    groups = [[everybody[rank] for rank in row] for row in rows(mesh.shape)[axis_name]]
    return max(statistics.median(map(min, zip(*group, strict=True))) for group in groups)


def timed(start: Callable[[], Pending], device: torch.device) -> float:
    """From its start on this rank until it has arrived."""
    started_s = time.perf_counter()
    start().wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


def compute_for(seconds: float, device: torch.device) -> None:
    """Keep the device busy for about so long, and return when it is done."""
    x = torch.ones(64, 64, device=device)
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        torch.mm(x, x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contention(mesh: Mesh, device: torch.device) -> dict[str, Any]:
    """All-to-alls on `ep` under all-reduces on `dp`, and the reverse: {count, median, p95}; the same on every rank.

    Both axes must have several ranks.  All call it together."""
    return {
        "all-to-all under all-reduce": under(Collective.ALL_TO_ALL, "ep", Collective.ALL_REDUCE, "dp", mesh, device),
        "all-reduce under all-to-all": under(Collective.ALL_REDUCE, "dp", Collective.ALL_TO_ALL, "ep", mesh, device),
    }


def under(
    what: Collective, axis: str, background: Collective, background_axis: str, mesh: Mesh, device: torch.device
) -> dict[str, Any]:
    alone_s = collective_s(what, FOREGROUND_BYTES, mesh, axis, device)
    large_bytes = FOREGROUND_BYTES
    while collective_s(background, large_bytes, mesh, background_axis, device) < SMALL_ONES * alone_s:
        if large_bytes >= MOST_BACKGROUND_BYTES:
            break
        large_bytes *= 2
    small = started(what, FOREGROUND_BYTES, getattr(mesh, axis), device)
    large = started(background, large_bytes, getattr(mesh, background_axis), device)
    rounds = [(_round(small, None, device), _round(small, large, device)) for _ in range(ROUNDS)]
    alone = all_gather_object(mesh, [took_s for without, _ in rounds for took_s, _ in without])
    alone_s = statistics.median(map(min, zip(*alone, strict=True)))
    found = summary(all_gather_object(mesh, [beside for _, beside in rounds]), alone_s)
    return found | {"alone_s": alone_s, "background_bytes": large_bytes}


def _round(small: Callable[[], Pending], large: Callable[[], Pending] | None, device: torch.device) -> list[tuple[float, bool]]:
    """Of each small one, how long it took here, and whether the large one was still on its way.  None: there is no large one."""
    compute_for(0.002, device)
    pending = large() if large is not None else None
    work, found = pending.work if pending is not None else None, []
    for _ in range(2 * SMALL_ONES):
        took_s = timed(small, device)
        found.append((took_s, work is not None and not work.is_completed()))
    if pending is not None:
        pending.wait()
    return found


def summary(of_ranks: Sequence[Sequence[Sequence[tuple[float, bool]]]], alone_s: float) -> dict[str, Any]:
    """`of_ranks`: of each rank its rounds.  None where nothing was under way together."""
    slowdowns = []
    for rounds in zip(*of_ranks, strict=True):
        for same in zip(*rounds, strict=True):
            if all(still for _, still in same):
                slowdowns.append(min(took_s for took_s, _ in same) / alone_s)
    return {
        "count": len(slowdowns),
        "median": statistics.median(slowdowns) if slowdowns else None,
        "p95": quantile(slowdowns, 0.95),
    }
