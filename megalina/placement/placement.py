"""Where experts sit: which expert is in each slot of each device.

A placement changes who computes, never what: tokens of an expert may go to any slot that holds it (Lina, section 5).
"""

from dataclasses import dataclass

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

    def slot_of(self, device: int, expert: int) -> int:
        """The first slot of the device that holds the expert; ValueError if none does."""
        return self.slots[device].index(expert)


def check_room(num_experts: int, num_devices: int, slots_per_device: int) -> None:
    """ValueError where not every expert finds a slot."""
    if num_devices < 1 or slots_per_device < 1:
        raise ValueError(f"{num_devices} devices of {slots_per_device} slots: both must be at least 1")
    if num_devices * slots_per_device < num_experts:
        raise ValueError(
            f"{num_experts} experts need as many slots, but {num_devices} devices of {slots_per_device} slots have "
            f"{num_devices * slots_per_device}: raise slots_per_device to {-(-num_experts // num_devices)} or more"
        )
