"""Aligned placements: experts that stay on a device keep their slot, so that as little as possible must be brought.

The bytes of a change are then those of the experts that each device lacks, whatever order a planner lists them in.
"""

from megalina.placement.placement import EMPTY, Placement


def aligned(old: Placement, new: Placement) -> Placement:
    """The experts of `new` on each device, in slots such that the fewest of them change.

    The others take the slots that are left, the lower expert the lower slot.  ValueError where the numbers of experts, devices
    or slots differ."""
    _check_alike(old, new)
    if old.slots == new.slots:
        return new
    return Placement(new.num_experts, tuple(_device(o, n) for o, n in zip(old.slots, new.slots, strict=True)))


def moved_slots(old: Placement, new: Placement, device: int) -> list[tuple[int, int]]:
    """(slot, expert) of one device that must be filled anew; a slot that becomes empty needs nothing."""
    _check_alike(old, new)
    pairs = zip(old.slots[device], new.slots[device], strict=True)
    return [(slot, after) for slot, (before, after) in enumerate(pairs) if after not in (before, EMPTY)]


def moved(old: Placement, new: Placement) -> int:
    """How many slots of all devices must be filled anew.  `aligned(old, new)` needs the fewest."""
    return sum(len(moved_slots(old, new, device)) for device in range(new.num_devices))


def _device(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    slots = [EMPTY] * len(old)
    coming = sorted(expert for expert in new if expert != EMPTY)
    for slot, expert in enumerate(old):
        if expert in coming:  # never EMPTY
            slots[slot] = expert
            coming.remove(expert)
    free = [slot for slot, expert in enumerate(slots) if expert == EMPTY]
    for slot, expert in zip(free, coming, strict=False):
        slots[slot] = expert
    return tuple(slots)


def _check_alike(old: Placement, new: Placement) -> None:
    shapes = [(p.num_experts, p.num_devices, p.slots_per_device) for p in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"placements differ in (experts, devices, slots a device): {shapes[0]} and {shapes[1]}")
