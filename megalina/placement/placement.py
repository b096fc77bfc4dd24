"""Where experts sit: which expert is in each slot of each device.

A placement changes who computes, never what: tokens of an expert may go to any slot that holds it (Lina, section 5).  Where one
takes another's place, experts that stay on a device keep their slot (`aligned`), so that as little as possible must be brought:
the bytes of a change are those of the experts that each device lacks, whatever order a planner lists them in."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalina.placement.predictors.predictor import Floats

EMPTY = -1  # a slot without an expert


@dataclass(frozen=True, slots=True)
class Placement:
    """`slots[device][slot]` is an expert, or EMPTY.  ValueError unless every expert sits somewhere."""

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        lengths = {len(device) for device in self.slots}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"devices have {sorted(lengths)} slots: each must have the same number of them, at least one")
        there = {expert for device in self.slots for expert in device}
        if strange := sorted(there - {EMPTY, *range(self.num_experts)}):
            raise ValueError(f"slots hold experts {strange}, but there are experts 0 to {self.num_experts - 1}")
        if missing := sorted(set(range(self.num_experts)) - there):
            raise ValueError(f"experts {missing} are in no slot: {self.num_devices} devices of {self.slots_per_device} slots")

    @property
    def num_devices(self) -> int:
        return len(self.slots)

    @property
    def slots_per_device(self) -> int:
        return len(self.slots[0])

    def copies(self) -> tuple[tuple[int, ...], ...]:
        """The devices that hold each expert, rising.  Two slots of one device with the same expert count once."""
        found: list[set[int]] = [set() for _ in range(self.num_experts)]
        for device, experts in enumerate(self.slots):
            for expert in experts:
                if expert != EMPTY:
                    found[expert].add(device)
        return tuple(tuple(sorted(devices)) for devices in found)


def check_room(num_experts: int, num_devices: int, slots_per_device: int) -> None:
    """ValueError where not every expert finds a slot."""
    if num_devices < 1 or slots_per_device < 1:
        raise ValueError(f"{num_devices} devices of {slots_per_device} slots: both must be at least 1")
    if num_devices * slots_per_device < num_experts:
        raise ValueError(
            f"{num_experts} experts need as many slots, but {num_devices} devices of {slots_per_device} slots have "
            f"{num_devices * slots_per_device}: raise slots_per_device to {-(-num_experts // num_devices)} or more"
        )


def aligned(old: Placement, new: Placement) -> Placement:
    """The experts of `new` on each device, in slots such that the fewest of them change.

    The others take the slots that are left, the lower expert the lower slot.  ValueError where the numbers of experts, devices
    or slots differ."""
    _check_alike(old, new)
    if old.slots == new.slots:
        return new
    return Placement(new.num_experts, tuple(_device(o, n) for o, n in zip(old.slots, new.slots, strict=True)))


def with_few_moves(old: Placement, new: Placement) -> Placement:
    """`new` with its devices in an order in which few slots change from `old`: the two that have most experts in common are the
    same device, and so on; of equals the lower numbers.  For planners to which devices are alike."""
    _check_alike(old, new)
    if old.slots == new.slots:
        return new
    common_NN = _held(old).astype(np.int64) @ _held(new).T
    of_old: dict[int, int] = {}
    taken = set[int]()
    for pair in np.argsort(-common_NN, axis=None, kind="stable").tolist():
        before, after = divmod(pair, new.num_devices)
        if before not in of_old and after not in taken:
            of_old[before] = after
            taken.add(after)
    if sum(int(common_NN[before, after]) for before, after in of_old.items()) <= common_NN.trace():
        return new
    return Placement(new.num_experts, tuple(new.slots[of_old[device]] for device in range(new.num_devices)))


def _held(placement: Placement) -> NDArray[np.bool_]:
    """[devices, experts]: who has whom."""
    held = np.zeros((placement.num_devices, placement.num_experts + 1), dtype=np.bool_)
    held[np.arange(placement.num_devices)[:, None], np.asarray(placement.slots)] = True  # EMPTY is the last column
    return held[:, :-1]


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


def checked_share(share_E: Floats, num_devices: int, slots_per_device: int) -> Floats:
    """`share_E` as float64 [E] in its own scale.  ValueError where a share is below 0 or not a number, or experts lack room."""
    share_E = np.asarray(share_E, np.float64)
    if share_E.ndim != 1 or not len(share_E):
        raise ValueError(f"shares have shape {share_E.shape}: give one number an expert, of at least one expert")
    if not (np.isfinite(share_E) & (share_E >= 0)).all():
        wrong = int(np.flatnonzero(~(np.isfinite(share_E) & (share_E >= 0)))[0])
        raise ValueError(f"expert {wrong} is expected to get a share of {share_E[wrong]}: shares must be finite and at least 0")
    check_room(len(share_E), num_devices, slots_per_device)
    return share_E


def scaled_share(share_E: Floats, num_devices: int, slots_per_device: int) -> Floats:
    """`share_E` scaled to sum 1, [E]; all zero means that nothing is known: uniform.  Errors as `checked_share`."""
    share_E = checked_share(share_E, num_devices, slots_per_device)
    largest = share_E.max()
    if largest == 0:
        return np.full(len(share_E), 1 / len(share_E))
    share_E = share_E / largest  # first, since the sum of very large numbers is infinite
    return share_E / share_E.sum()
