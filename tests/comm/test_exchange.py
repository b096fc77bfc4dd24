"""Gathers on three ranks: small ones go to everybody at once, large ones round the ring, and nobody sees a difference."""

import torch

from megalina.collective_log import CollectiveLog
from megalina.comm.exchange import DIRECT_BYTES, start_gather
from megalina.mesh import build_mesh
from tests.parallel.ranks import run_on_ranks

SMALL, LARGE = DIRECT_BYTES // 8, DIRECT_BYTES // 8 + 1  # float64


def _gathered() -> list[tuple[torch.Tensor, int]]:
    mesh = build_mesh(ep=3)
    found = []
    for shape in ((1,), (2, 3), (0, 4), (SMALL,), (LARGE,), (LARGE, 2)):
        mine = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) + 1000.0 * mesh.ep.rank
        pending = start_gather(mine, mesh.ep, CollectiveLog(mesh.world.rank))
        found.append((pending.wait(), pending.num_bytes))
        whole = torch.cat([mine + 1000.0 * (rank - mesh.ep.rank) for rank in range(3)])
        assert torch.equal(found[-1][0], whole), (shape, mesh.ep.rank)
    return found


def test_gathers_of_every_size_arrive_whole_and_in_the_order_of_ranks() -> None:
    results = run_on_ranks(3, _gathered)
    for of_ranks in zip(*results, strict=True):
        assert len({tuple(value.shape) for value, _ in of_ranks}) == 1
        assert all(num_bytes * 3 == value.nbytes for value, num_bytes in of_ranks)
