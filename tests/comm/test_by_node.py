"""Gradients summed by node: the sums, shards and gathers of all ranks, the same bits everywhere, in any number of pieces."""

import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist

from megalina.collective_log import CollectiveLog
from megalina.comm.by_node import Relay, start_gather_by_node, start_scatter_by_node, start_sum_by_node
from megalina.layout import by_node
from megalina.mesh import Axis, build_meshes
from tests.parallel.ranks import run_on_ranks

NODES = {4: [2], 6: [2, 3]}  # of so many ranks: ranks on a node
SHARDS: dict[int, list[tuple[int, list[int]]]] = {  # ranks on a node, elements of each rank
    4: [(2, [3, 3, 3, 3]), (2, [5, 0, 2, 4])],
    6: [(3, [1, 2, 3, 4, 5, 0]), (2, [2, 2, 2, 2, 2, 2])],
}


def tensor(rank: int, length: int, number: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(length, generator=generator, dtype=torch.float64).to(dtype)


def world_axis(ranks_per_node: int) -> tuple[Axis, CollectiveLog]:
    mesh = build_meshes(ranks_per_node=ranks_per_node)[1]
    assert mesh.sums_by_node and mesh.world.nodes is not None
    return mesh.world, CollectiveLog(mesh.world.rank)


def _summed(ranks_per_node: int) -> list[torch.Tensor]:
    axis, log = world_axis(ranks_per_node)
    relay, out = Relay(), []
    for number, (length, dtype) in enumerate([(48, torch.float64), (50, torch.float32), (7, torch.float64), (1, torch.float64)]):
        flat = tensor(axis.rank, length, number, dtype)
        pending = start_sum_by_node(flat, axis, log, relay)
        assert pending.num_bytes == flat.nbytes and pending.wait() is flat
        every = torch.stack([tensor(rank, length, number, dtype) for rank in range(axis.size)])
        torch.testing.assert_close(flat, every.sum(0))
        out.append(flat)
    relay.close()
    return out


def _sharded(ranks_per_node: int, sizes: Sequence[int]) -> None:
    """A reduce-scatter, and the gather that undoes it."""
    axis, log = world_axis(ranks_per_node)
    relay, length = Relay(), sum(sizes)
    first = sum(sizes[: axis.rank])
    flat = tensor(axis.rank, length, 0)
    own = flat[first : first + sizes[axis.rank]]
    whole = torch.stack([tensor(rank, length, 0) for rank in range(axis.size)]).sum(0)
    start_scatter_by_node(flat, own, sizes, axis, log, relay).wait()
    torch.testing.assert_close(own, whole[first : first + sizes[axis.rank]])
    for dtype in (torch.float64, torch.bfloat16):
        gathered = torch.full((length,), torch.nan, dtype=dtype)
        mine = gathered[first : first + sizes[axis.rank]]
        mine.copy_(own)
        pending = start_gather_by_node(gathered, mine, sizes, axis, log, relay)
        assert pending.num_bytes == mine.nbytes and pending.wait() is gathered
        torch.testing.assert_close(gathered, whole.to(dtype))
    relay.close()


def _many_at_once() -> None:
    """Pieces under way together are not mixed up.  Each rank's threads are delayed in their own way: stages of different
    exchanges overtake each other everywhere."""
    axis, log = world_axis(2)
    chance, relay = random.Random(axis.rank), Relay()
    plain = dist.all_to_all_single

    def late(*a: object, **k: object) -> object:
        time.sleep(chance.random() * 0.004)
        return plain(*a, **k)

    dist.all_to_all_single = late
    try:
        flats = [tensor(axis.rank, 64 + number, number) for number in range(24)]
        pending = [start_sum_by_node(flat, axis, log, relay) for flat in flats]
        for p in reversed(pending):
            p.wait()
    finally:
        dist.all_to_all_single = plain
    for number, flat in enumerate(flats):
        torch.testing.assert_close(flat, torch.stack([tensor(r, len(flat), number) for r in range(axis.size)]).sum(0))
    relay.close()


def _everything(world: int) -> list[list[torch.Tensor]]:
    """On one pool: starting ranks takes longer than all of it."""
    for per_node, sizes in SHARDS[world]:
        _sharded(per_node, sizes)
    if world == 4:
        _many_at_once()
    return [_summed(per_node) for per_node in NODES[world]]


@pytest.mark.parametrize("world", [4, pytest.param(6, marks=pytest.mark.full)])
def test_sums_shards_and_gathers_by_node_are_those_of_all_ranks(world: int) -> None:
    """Sums in the same bits on every rank."""
    by_rank = run_on_ranks(world, _everything, world)
    for of_ranks in zip(*([value for values in own for value in values] for own in by_rank), strict=True):
        assert all(torch.equal(value, of_ranks[0]) for value in of_ranks)


def test_an_axis_is_by_node_where_nodes_hold_several_ranks_of_it_equally_many() -> None:
    assert by_node([0, 1, 2, 3], 2) == [[0, 1], [2, 3]] and by_node([1, 3, 5, 7], 4) == [[1, 3], [5, 7]]
    assert by_node([0, 1, 2, 3], 4) == [] and by_node([0, 2, 4, 6], 2) == []
    assert by_node([0, 1, 2], 2) == [] and by_node([0, 1, 2, 3, 4, 5], 4) == []


class _Work:
    def __init__(self, error: Exception | None = None):
        self.error = error

    def wait(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("at", [0, 1, 2])
def test_whoever_waits_gets_the_error_of_a_stage(at: int) -> None:
    relay = Relay()
    before = threading.active_count()
    stages = [_stage(_Work(ConnectionError(f"stage {i}") if i == at else None)) for i in range(3)]
    relayed = relay.start("dp sum", stages)
    with pytest.raises(ConnectionError, match=f"stage {at}"):
        relayed.wait()
    assert relay.start("dp sum", [_stage(_Work())] * 3).wait() is None  # its threads go on
    relay.close()
    until_s = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until_s:
        time.sleep(0.01)
    assert threading.active_count() <= before


def _stage(work: _Work) -> Callable[[], _Work]:
    return lambda: work
