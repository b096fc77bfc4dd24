"""Collectives that have the wire to themselves, as calls of the trainer's own exchanges, and how they are timed.

As in `megalina/comm/calibration.py` a collective counts with the shortest time over the ranks of its group, since who comes last
waited for nobody; of its repeats the median counts, and of several groups that send side by side the slowest.
"""

import statistics
import time
from collections.abc import Callable

import torch

from megalina.collective_log import CollectiveLog
from megalina.comm import exchange
from megalina.comm.exchange import Pending
from megalina.layout import rows
from megalina.mesh import Axis, Mesh, build_mesh, everybodys
from megalina.perfmodel.sim.collectives import Collective

REPEATS = 15
PAUSE_S = 0.001  # at least, before each; the core computes meanwhile, as it does in a step
ELEMENT_BYTES = 4


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
    everybodys(mesh, None)  # all are through with what came before
    times_s, pause_s = [], PAUSE_S
    for _ in range(REPEATS + 1):
        compute_for(pause_s, device)
        times_s.append(timed(start, device))
        pause_s = max(PAUSE_S, times_s[-1])
    everybody = everybodys(mesh, times_s[1:])
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
