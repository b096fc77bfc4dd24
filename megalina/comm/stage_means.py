"""Means over the ranks of each stage of a pipeline, known to all ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megalina.collective_log import CollectiveLog
from megalina.comm import exchange
from megalina.mesh import Mesh


def stage_means(mesh: Mesh, log: CollectiveLog, own: Sequence[float]) -> list[list[float]]:
    """Of each of a rank's numbers its mean over the ranks of each stage: [numbers][stages].

    All ranks must call it, each with as many numbers: a small gather over the world."""
    device = "cuda" if dist.is_initialized() and dist.get_backend(mesh.world.group) == "nccl" else "cpu"
    mine_1K = torch.tensor([own], dtype=torch.float64, device=device)
    all_RK = exchange.start_gather(mine_1K, mesh.world, log).wait()
    means_KP: list[list[float]] = all_RK.view(mesh.pp, -1, len(own)).mean(1).T.tolist()
    return means_KP
