"""The mesh cuts the world into rows that tile it, and names who holds copies of what."""

import itertools
import math
import time

import pytest
import torch
import torch.distributed as dist

from megalina.layout import axis_sizes, ranks_of, rows
from megalina.mesh import Axis, build_mesh
from tests.parallel.ranks import run_on_ranks

SHAPES = [
    {"edp": edp, "ep": ep, "cp": cp, "tp": tp} for edp, ep, cp, tp in itertools.product((1, 3), (1, 2, 4), (1, 2), (1, 2, 4))
]


def place(rank: int, shape: dict[str, int]) -> dict[str, int]:
    """Coordinates of a rank, by division: tp is innermost, edp outermost."""
    out = {}
    for axis in ("tp", "cp", "ep", "edp"):
        rank, out[axis] = divmod(rank, shape[axis])
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_axis_tiles_the_world_with_rows_that_differ_along_it_alone(shape: dict[str, int]) -> None:
    along = {"world": "edp ep cp tp", "tp": "tp", "cp": "cp", "cp_tp": "cp tp", "ep": "ep", "counts": "ep", "edp": "edp"}
    along |= {"dp": "edp ep cp", "copies": "edp cp tp"}
    tables = rows(shape)
    assert tables.keys() == along.keys()
    for name, table in tables.items():
        free = along[name].split()
        assert sorted(itertools.chain(*table)) == list(range(math.prod(shape.values())))
        for row in table:
            assert len(row) == math.prod(shape[axis] for axis in free) and row == sorted(row)
            fixed = [{k: v for k, v in place(rank, shape).items() if k not in free} for rank in row]
            assert all(f == fixed[0] for f in fixed)


def test_tensor_parallel_ranks_are_neighbours() -> None:
    assert rows({"edp": 2, "ep": 2, "tp": 2})["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rows({"edp": 2, "ep": 2, "tp": 2})["copies"] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_packing_gives_each_rank_the_experts_of_its_neighbours() -> None:
    packed = rows(axis_sizes(8, tp=2, ep=4, packing=2))
    assert packed["ep"] == [[0, 2], [1, 3], [4, 6], [5, 7]] and packed["edp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert packed["tp"] == rows(axis_sizes(8, tp=2, ep=4))["tp"] and packed["dp"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert ranks_of(axis_sizes(8, tp=2, ep=4, packing=2))("ep", 6) == (4, 6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_are_those_of_the_rows(shape: dict[str, int]) -> None:
    sizes = axis_sizes(math.prod(shape.values()), tp=shape["tp"], ep=shape["ep"], cp=shape["cp"])
    assert sizes == {name: len(table[0]) for name, table in rows(shape).items()}


def test_a_single_process_has_nobody_to_talk_to() -> None:
    mesh = build_mesh()
    assert mesh.shape == {"edp": 1, "ep": 1, "tp": 1}
    for name in ("world", "tp", "cp", "ep", "counts", "edp", "dp", "copies"):
        assert getattr(mesh, name) == Axis(name)
    assert mesh.cp_tp == mesh.tp and (mesh.readers, mesh.reader) == (1, 0)


def test_a_world_that_cannot_be_cut_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"tp \(2\) x ep \(3\) = 6 must divide the world size \(1\)"):
        build_mesh(tp=2, ep=3)
    with pytest.raises(ValueError, match=r"tp \(1\) x cp \(2\) x ep \(1\) = 2 must divide the world size \(1\)"):
        build_mesh(cp=2)


def test_ranks_of_context_and_tensor_parallelism_are_neighbours_and_dense_gradients_are_summed_over_both() -> None:
    found = rows({"edp": 1, "ep": 2, "cp": 2, "tp": 2})
    assert found["cp_tp"] == [[0, 1, 2, 3], [4, 5, 6, 7]] and found["cp"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert found["dp"] == [[0, 2, 4, 6], [1, 3, 5, 7]] and found["ep"] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def wait_for_a_silent_rank() -> tuple[float, str]:
    """On rank 0: seconds until a collective in which rank 1 takes no part gives up, and why."""
    mesh = build_mesh(ep=2, timeout_s=0.5)
    started_s, why = time.monotonic(), ""
    if mesh.world.rank == 0:
        try:
            dist.all_reduce(torch.ones(3), group=mesh.ep.group)
        except RuntimeError as error:
            why = str(error)
    return time.monotonic() - started_s, why


def test_a_collective_that_a_rank_stays_away_from_ends_at_the_time_out() -> None:
    (waited_s, why), _ = run_on_ranks(2, wait_for_a_silent_rank)
    assert "imed out" in why and 0.4 < waited_s < 20
