"""Resharding: every layout's tensors become every other layout's, bit by bit, and each missing element travels once."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalina.collective_log import CollectiveLog
from megalina.comm.slice import Slice, boxes, whole_shape
from megalina.mesh import Mesh, build_meshes
from megalina.parallel.reshard import Place, move, parcels
from tests.checkpoint.test_checkpoints import assert_filled, cut, emptied, mesh_without_ranks, piece, slices
from tests.parallel.ranks import run_on_ranks

WORLD = 4
LAYOUTS = [(tp, ep, zero) for tp, ep in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)) for zero in (False, True)]


def places(part: Slice, mesh: Mesh) -> list[Place]:
    return [(box.offsets, tuple(box.data.shape)) for box in boxes(part, mesh)]


def window(place: Place) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*place, strict=True))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, tuple[int, int, int], Any, Any]:
    """World, shape of a tensor, and two ways to cut it: (tp, ep, dimension that tp cuts or None, flat pieces of copies)."""
    world = draw(st.sampled_from([2, 4, 8]))
    shape = draw(st.tuples(st.sampled_from([8, 16]), st.sampled_from([1, 3, 8]), st.sampled_from([1, 5, 8])))

    def one() -> tuple[int, int, int | None, bool]:
        tp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= world]))
        ep = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n * tp <= world]))
        dims = [dim for dim in (0, 1, 2) if shape[dim] % (tp * (ep if dim == 0 else 1)) == 0]
        return tp, ep, draw(st.sampled_from([None, *dims])), draw(st.booleans())

    return world, shape, one(), one()


def part_of(whole: Tensor, mesh: Mesh, tp_dim: int | None, flat: bool) -> Slice:
    sharded = {"ep": 0} if tp_dim is None else {"ep": 0, "tp": tp_dim}
    local = cut(whole, mesh, sharded)
    if not flat:
        return Slice(local, sharded)
    values, start = piece(local, mesh.edp if tp_dim is not None else mesh.copies)
    return Slice(values, sharded, shape=tuple(local.shape), start=start)


@given(case=layouts())
def test_what_a_rank_lacks_comes_once_from_one_that_has_it_and_both_ends_agree_on_the_order(case: Any) -> None:
    world, shape, *cuts = case
    whole = torch.arange(math.prod(shape)).view(shape)
    held, wanted = [], []
    for rank in range(world):
        for side, (tp, ep, tp_dim, flat) in zip((held, wanted), cuts, strict=True):
            mesh = mesh_without_ranks(world, tp, ep, rank)
            side.append(places(part_of(whole, mesh, tp_dim, flat), mesh))
    seen = [list(parcels(shape, held, wanted, rank)) for rank in range(world)]
    for rank in range(world):
        assert all(rank in (p.sender, p.receiver) and p.sender != p.receiver for p in seen[rank])
        for other in range(world):
            sent = [p for p in seen[rank] if p.sender == rank and p.receiver == other]
            assert sent == [p for p in seen[other] if p.sender == rank and p.receiver == other]
            assert all(p.have in held[rank] and p.want in wanted[other] for p in sent)
        arrivals, needed = torch.zeros(shape), torch.zeros(shape)
        for p in seen[rank]:
            if p.receiver == rank:
                arrivals[window(p.common)] += 1
        for place in wanted[rank]:
            needed[window(place)] = 1
        for place in held[rank]:
            needed[window(place)] = 0
        assert torch.equal(arrivals, needed)


def one_box(rows: int, count: int = 1) -> list[Place]:
    return [((i * rows,), (rows,)) for i in range(count)]


def test_ranks_that_hold_copies_take_turns() -> None:
    """Ranks 0 to 3 hold two boxes each, ranks 4 to 7 need both."""
    held = [one_box(10, 2)] * 4 + [[]] * 4
    wanted: list[list[Place]] = [[]] * 4 + [one_box(10, 2)] * 4
    sent = Counter(p.sender for rank in range(4) for p in parcels((20,), held, wanted, rank))
    assert sent == {0: 2, 1: 2, 2: 2, 3: 2}


def test_one_rank_that_lacks_several_boxes_takes_them_from_several_ranks() -> None:
    held = [one_box(10, 2), one_box(10, 2), []]
    wanted: list[list[Place]] = [[], [], one_box(10, 2)]
    assert sorted(p.sender for p in parcels((20,), held, wanted, 2)) == [0, 1]


def test_a_rank_is_served_by_its_neighbours() -> None:
    """Nodes of four: ranks 1 and 5 hold copies, all others need them."""
    held = [one_box(10) if rank in (1, 5) else [] for rank in range(8)]
    got = [p for rank in range(8) for p in parcels((10,), held, [one_box(10)] * 8, rank) if p.receiver == rank]
    assert {p.receiver: p.sender for p in got} == {0: 1, 2: 1, 3: 1, 4: 5, 6: 5, 7: 5}


def test_many_small_pieces_are_found_without_looking_at_all_pairs() -> None:
    """2,000 pieces on each of 2 ranks, cut at other places before and after."""
    held, wanted = [], []
    for rank in range(2):
        held.append([((2 * i + rank, 0), (1, 30)) for i in range(2000)])
        wanted.append([((i, 15 * rank), (1, 15)) for i in range(4000)])
    got = [p for p in parcels((4000, 30), held, wanted, 0) if p.receiver == 0]
    assert len(got) == 2000 and all(p.sender == 1 for p in got)


def test_a_box_that_reaches_far_is_found_behind_short_ones() -> None:
    """Rank 0 holds the left half of all rows, rank 1 the right half row by row; rank 2 needs the last row."""
    held: list[list[Place]] = [[((0, 0), (16, 4))], [((row, 4), (1, 4)) for row in range(16)], []]
    got = list(parcels((16, 8), held, [[], [], [((15, 0), (1, 3))]], 2))
    assert [(p.sender, p.common) for p in got] == [(0, ((15, 0), (1, 3)))]


# on four ranks


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def every_layout_becomes_every_other() -> dict[str, Any]:
    """pairs: of layouts; most: all-to-alls in one move; idle: bytes sent where nothing changes."""
    made = {(1, 4 // k): mesh for k, mesh in build_meshes(ep=4, packings=(1, 2, 4)).items()}
    made |= {(2, 2 // k): mesh for k, mesh in build_meshes(tp=2, ep=2, packings=(1, 2)).items()}
    pairs, most, idle = 0, 0, 0
    for (tp, ep, zero), (other_tp, other_ep, other_zero) in itertools.product(LAYOUTS, LAYOUTS):
        mesh, other = made[tp, ep], made[other_tp, other_ep]
        expected = slices(other, zero=other_zero)
        new = emptied(expected)
        log = CollectiveLog(mesh.world.rank)
        old = {n: [p] for n, p in slices(mesh, zero=zero).items()}
        sent_bytes = move(old, mesh, {n: [p] for n, p in new.items()}, other, log)
        most = max(most, sum(e.kind == "all-to-all" for e in log.entries()))
        if (tp, ep, zero) == (other_tp, other_ep, other_zero):
            idle += sent_bytes
        assert_filled(new, expected, other)
        pairs += 1
    return {"pairs": pairs, "most": most, "idle": idle, "bits": odd_bits_survive(made), "refused": refusals(made)}


def odd_bits_survive(made: dict[tuple[int, int], Mesh]) -> bool:
    """Every bit pattern that a bfloat16 can have: infinities, NaNs with their payloads, zeros with their signs."""
    whole = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(4, 128, 128)
    before, after = made[1, 4], made[1, 2]
    new = Slice(torch.zeros(2, 128, 128, dtype=torch.bfloat16), {"ep": 0})
    move({"w": [Slice(cut(whole, before, {"ep": 0}), {"ep": 0})]}, before, {"w": [new]}, after, CollectiveLog(0))
    return torch.equal(bits_of(new.local), bits_of(cut(whole, after, {"ep": 0})))


def refusals(made: dict[tuple[int, int], Mesh]) -> list[str]:
    mesh = made[1, 1]
    whole = Slice(torch.zeros(4, 6), {})
    said = []
    for new in ({"v": [whole]}, {"w": [Slice(torch.zeros(4, 7), {})]}, {"w": [Slice(torch.zeros(4, 6).double(), {})]}):
        try:
            move({"w": [whole]}, mesh, new, mesh, CollectiveLog(0))
        except ValueError as error:
            said.append(str(error))
    hole = Slice(torch.zeros(20), {}, shape=(4, 6))  # the same on all ranks: nobody has the last four elements
    try:
        move({"w": [hole]}, mesh, {"w": [whole]}, mesh, CollectiveLog(0))
    except ValueError as error:
        said.append(str(error))
    return said


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, Any]]:
    return run_on_ranks(WORLD, every_layout_becomes_every_other)


def test_tensors_of_every_layout_become_those_of_every_other(on_ranks: list[dict[str, Any]]) -> None:
    assert [r["pairs"] for r in on_ranks] == [100] * WORLD


def test_there_is_one_all_to_all_for_each_dtype_and_none_where_nothing_is_lacking(on_ranks: list[dict[str, Any]]) -> None:
    """The tensors are of two dtypes."""
    assert {r["most"] for r in on_ranks} == {2} and {r["idle"] for r in on_ranks} == {0}


def test_every_bit_pattern_arrives_as_it_was(on_ranks: list[dict[str, Any]]) -> None:
    assert all(r["bits"] for r in on_ranks)


def test_other_tensors_and_holes_are_refused_by_name(on_ranks: list[dict[str, Any]]) -> None:
    for r in on_ranks:
        absent, shape, dtype, hole = r["refused"]
        assert absent.startswith("v is absent in the old layout")
        assert "w is ((4, 6), torch.float32) in the old layout, ((4, 7), torch.float32) in the new one" in shape
        assert "torch.float64" in dtype
        assert hole.startswith("w: no rank holds 4 of the elements that rank")


def test_one_process_copies() -> None:
    mesh = mesh_without_ranks(1, 1, 1, 0)
    whole = torch.arange(24.0).view(4, 6)
    first, last = (Slice(whole.flatten()[a:b].clone(), {}, shape=(4, 6), start=a) for a, b in ((0, 10), (10, 24)))
    new = Slice(torch.zeros(4, 6), {})
    assert move({"w": [first, last]}, mesh, {"w": [new]}, mesh, CollectiveLog(0)) == 0
    assert torch.equal(new.local, whole) and whole_shape(new, mesh) == (4, 6)
