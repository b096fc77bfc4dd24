"""Contention: how much longer a collective takes while another group's are on the wire.

A large one is started in the background, and some small ones of the other group are made one after another.  A small one counts
where the large one was not done on any rank when it ended, with the smallest time over the ranks, against the same row of small
ones without the large one.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megalina.comm.exchange import Pending
from megalina.measure.collectives import collective_s, compute_for, started, timed
from megalina.mesh import Mesh, everybodys
from megalina.perfmodel.sim.collectives import Collective
from megalina.timeline.contention import quantile

FOREGROUND_BYTES = 2**18
SMALL_ONES = 4  # under each large one, which would take so many times as long alone
ROUNDS = 12
MOST_BACKGROUND_BYTES = 2**28


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
    alone = everybodys(mesh, [took_s for without, _ in rounds for took_s, _ in without])
    alone_s = statistics.median(map(min, zip(*alone, strict=True)))
    found = summary(everybodys(mesh, [beside for _, beside in rounds]), alone_s)
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
