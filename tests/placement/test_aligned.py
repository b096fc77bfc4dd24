"""Aligned placements: the same experts on each device, and as few slots to fill as possible."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.placement.placement import EMPTY, Placement, aligned, moved, moved_slots, with_few_moves


@st.composite
def changes(draw: st.DrawFn) -> tuple[Placement, Placement]:
    """Two placements of one shape; also with empty slots, and an expert twice on a device."""
    num_experts, num_devices = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    slots_per_device = -(-num_experts // num_devices) + draw(st.integers(0, 1))
    more = num_devices * slots_per_device - num_experts

    def placement() -> Placement:
        slots = [*range(num_experts), *draw(st.lists(st.integers(EMPTY, num_experts - 1), min_size=more, max_size=more))]
        slots = draw(st.permutations(slots))
        cut = range(0, len(slots), slots_per_device)
        return Placement(num_experts, tuple(tuple(slots[i : i + slots_per_device]) for i in cut))

    return placement(), placement()


@given(changes())
def test_each_device_has_the_new_experts_and_no_order_needs_fewer(case: tuple[Placement, Placement]) -> None:
    old, new = case
    found = aligned(old, new)
    fewest = 0
    for before, wanted, after in zip(old.slots, new.slots, found.slots, strict=True):
        assert sorted(after) == sorted(wanted)
        orders = set(permutations(wanted))
        fewest += min(sum(e not in (b, EMPTY) for b, e in zip(before, order, strict=True)) for order in orders)
    assert moved(old, found) == fewest <= moved(old, new)
    assert aligned(old, found) == found and aligned(old, old) == old and moved(old, old) == 0


@given(changes())
def test_filling_what_moved_gives_the_new_placement(case: tuple[Placement, Placement]) -> None:
    old, new = case
    for device, wanted in enumerate(new.slots):
        filled = list(old.slots[device])
        for slot, expert in moved_slots(old, new, device):
            assert expert != EMPTY
            filled[slot] = expert
        assert all(e == w for e, w in zip(filled, wanted, strict=True) if w != EMPTY)


def test_experts_that_stay_keep_their_slot() -> None:
    old = Placement(5, ((0, 1, 2), (3, 4, EMPTY)))
    new = Placement(5, ((2, 3, 0), (1, EMPTY, 4)))
    found = aligned(old, new)
    assert found.slots == ((0, 3, 2), (1, 4, EMPTY))
    assert moved(old, found) == 2 and moved(old, new) == 5
    assert moved_slots(old, found, 0) == [(1, 3)] and moved_slots(old, found, 1) == [(0, 1)]


def test_what_leaves_without_another_coming_costs_nothing() -> None:
    old, new = Placement(2, ((0, 1), (1, EMPTY))), Placement(2, ((0, EMPTY), (EMPTY, 1)))
    assert aligned(old, new).slots == ((0, EMPTY), (1, EMPTY)) and moved(old, aligned(old, new)) == 0


def test_placements_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 1\) and \(2, 1, 2\)"):
        aligned(Placement(2, ((0,), (1,))), Placement(2, ((0, 1),)))
    with pytest.raises(ValueError, match=r"\(2, 2, 1\) and \(1, 2, 1\)"):
        moved(Placement(2, ((0,), (1,))), Placement(1, ((0,), (0,))))


@given(changes())
def test_devices_that_are_alike_change_places_where_fewer_slots_change(case: tuple[Placement, Placement]) -> None:
    old, new = case
    settled = with_few_moves(old, new)
    assert sorted(settled.slots) == sorted(new.slots)
    assert moved(old, aligned(old, settled)) <= moved(old, aligned(old, new)) or len({*old.slots[0]}) < old.slots_per_device
    assert with_few_moves(old, old) is old


def test_the_devices_with_most_in_common_are_the_same() -> None:
    old = Placement(6, ((0, 1, 2), (3, 4, 5), (0, 3, EMPTY)))
    new = Placement(6, ((3, 4, 1), (3, 0, 2), (2, 1, 5)))
    settled = with_few_moves(old, new)
    assert settled.slots == ((3, 0, 2), (3, 4, 1), (2, 1, 5))
    assert moved(old, aligned(old, settled)) == 5 < moved(old, aligned(old, new))
