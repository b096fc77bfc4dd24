"""Groups: each talks as a gloo group of its own would, and all of a process share one thread that moves bytes."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalina.groups import is_gloo, new_group
from tests.parallel.ranks import run_on_ranks


def byte_movers() -> int:
    names = (Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task"))
    return sum(name == "gloo_tcp_loop" for name in names)


def sums_in_groups(interface: str) -> tuple[int, list[float], list[bool]]:
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    before = byte_movers()
    rows = [[0, 1], [0, 2], [1, 2], [0, 1, 2], [2, 0, 1], [0, 1, 2]]
    groups = [new_group(row) for row in rows]
    mine = [group for group, row in zip(groups, rows, strict=True) if dist.get_rank() in row]
    values = [torch.full((1000,), float(dist.get_rank() + 1)) for _ in mine]
    works = [dist.all_reduce(value, group=group, async_op=True) for value, group in zip(values, mine, strict=True)]
    for work in reversed(works):  # all are under way at once
        work.wait()
    return byte_movers() - before, [float(v.mean()) for v in values], [is_gloo(g) for g in (None, *mine)]


@pytest.mark.parametrize("interface", ["", "lo"])
def test_groups_share_one_thread_that_moves_bytes(interface: str) -> None:
    for (threads, sums, gloo), expected in zip(
        run_on_ranks(3, sums_in_groups, interface), [[3, 4, 6, 6, 6], [3, 5, 6, 6, 6], [4, 5, 6, 6, 6]], strict=True
    ):
        assert threads == 1
        assert sums == expected
        assert all(gloo)
