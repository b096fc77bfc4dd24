"""Slowdowns as the whole group of a collective saw them: a rank's own clock can't tell waiting for others from sending.

A rank that comes early waits for the others, and its transfer lasts as long.  The last one to come waits for nobody, so the
smallest slowdown over the ranks of a group is the transfer's own, and no two clocks are compared.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megalina.collective_log import CollectiveLog
from megalina.comm import exchange
from megalina.mesh import Axis, Mesh
from megalina.step.program import Kind, Program
from megalina.timeline.contention import CALIBRATED_AXIS, Alone, own_slowdowns
from megalina.timeline.recorder import Event


def slowdowns(
    mesh: Mesh, log: CollectiveLog, program: Program, events: Sequence[Event], alone: Mapping[str, Alone]
) -> dict[str, float]:
    """{tag: slowdown} of what a step sent along the axes that are calibrated.

    All ranks must call it, each with its own events of the same step of `program`: a small gather along each of the axes."""
    own, out = own_slowdowns(events, alone), dict[str, float]()
    for name in dict.fromkeys(CALIBRATED_AXIS.values()):
        axis: Axis = getattr(mesh, name)
        if axis.group is not None:
            out.update(_smallest(axis, log, program, own))
    return out


def _smallest(axis: Axis, log: CollectiveLog, program: Program, own: Mapping[str, float]) -> Mapping[str, float]:
    starts = [(s.op.name.lower(), s) for s in program if s.kind is Kind.START and s.op is not None and s.axis == axis.name]
    tags = [instruction.tag for op, instruction in starts if CALIBRATED_AXIS.get(op) == axis.name]
    device = "cuda" if dist.get_backend(axis.group) == "nccl" else "cpu"
    mine_1X = torch.tensor([[own.get(tag, math.inf) for tag in tags]], dtype=torch.float64, device=device)
    smallest = exchange.start_gather(mine_1X, axis, log).wait().amin(0).tolist()
    return {tag: slowdown for tag, slowdown in zip(tags, smallest, strict=True) if math.isfinite(slowdown)}
