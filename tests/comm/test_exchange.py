"""Gathers and sums on three ranks: small ones go to everybody at once, large ones round the ring, and nobody can tell."""

import torch

from megalina.collective_log import CollectiveLog
from megalina.comm.exchange import DIRECT_BYTES, start_gather, start_max, start_sum
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


def _summed() -> list[torch.Tensor]:
    axis, log = build_mesh(ep=3).ep, CollectiveLog(0)
    found = []
    shapes = [((1,), torch.float64), ((2, 3), torch.float32), ((0,), torch.float64), ((SMALL,), torch.float64)]
    for number, (shape, dtype) in enumerate([*shapes, ((LARGE,), torch.float64), ((5,), torch.int32)]):
        every = [(100 * torch.randn(shape, generator=torch.Generator().manual_seed(10 * number + r))).to(dtype) for r in range(3)]
        mine = every[axis.rank].clone()
        pending = start_sum(mine, axis, log)
        assert pending.num_bytes == mine.nbytes
        total, most = pending.wait(), start_max(mine, axis, log).wait()
        torch.testing.assert_close(total, torch.stack(every).sum(0, dtype=dtype))
        assert torch.equal(most, torch.stack(every).amax(0)) and torch.equal(mine, every[axis.rank])
        found += [total, most]
    return found


def test_sums_of_every_size_are_those_of_all_ranks_in_the_same_bits() -> None:
    for of_ranks in zip(*run_on_ranks(3, _summed), strict=True):
        assert all(torch.equal(value, of_ranks[0]) and value.dtype == of_ranks[0].dtype for value in of_ranks)
