"""First-fit decreasing: whole devices for experts that fill them, the rest packed into the first device with room (Lina, 5.2).

The paper leaves open how numbers are rounded and how full a device may be.  These points are fields of `FirstFit`.

Shapes: E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil, floor
from typing import Literal

from megalina.placement.placement import EMPTY, Placement, checked_share, scaled_share
from megalina.placement.predictors.predictor import Floats

Rounding = Literal["floor", "nearest", "ceil"]
ROUNDING_ERROR = 1e-9  # of a device: sums of shares that should be whole may miss by this


@dataclass(frozen=True, slots=True)
class FirstFit:
    """Expert e with share s wants n = s * num_devices devices (Lina, equation 1).  ValueError for fields out of range.

    Whole devices go to the experts that want at least one, the most wanted first.  The rest is packed in falling order into the
    first device with room, or where none has room into the least loaded one with a free slot.  Experts that nobody expects come
    last, each to the least loaded device, which is a free one while there are any; of these, to that with the fewest experts.
    No device holds an expert twice.  Assumes an even split over replicas."""

    rounding: Rounding = "floor"
    """Of n for experts that want one device or more.  floor: the remainder is packed; nearest, ceil: n becomes a whole number."""
    capacity: float = 1.0  # a device takes no further expert where its load would pass this, 1 being a device's fair share
    renormalise: bool = True  # scale shares that sum to less than 1; those that sum to more are scaled anyhow
    most_per_device: int = 4  # experts; more only where some expert would have no slot otherwise
    fill: bool = False  # what is free then gets more replicas, for splits that see loads: expectations may be wrong

    def __post_init__(self) -> None:
        if self.rounding not in ("floor", "nearest", "ceil"):
            raise ValueError(f"rounding is {self.rounding!r}: give floor, nearest or ceil")
        if not self.capacity > 0:
            raise ValueError(f"capacity is {self.capacity} of a device: it must be above 0")
        if self.most_per_device < 1:
            raise ValueError(f"most_per_device is {self.most_per_device}: it must be at least 1")

    def __call__(self, share_E: Floats, num_devices: int, slots_per_device: int) -> Placement:
        """The placement for an expected share of rows [E]; all zero means uniform.  ValueError where experts lack room."""
        share_E = checked_share(share_E, num_devices, slots_per_device)
        if self.renormalise or not share_E.any() or share_E.sum() > 1:
            share_E = scaled_share(share_E, num_devices, slots_per_device)
        wanted = [share * num_devices for share in share_E.tolist()]
        falling = sorted(range(len(wanted)), key=lambda e: (-wanted[e], e))
        devices = [_Device(number, slots_per_device) for number in range(num_devices)]
        spare = num_devices * slots_per_device - len(wanted)  # slots for second and further replicas
        has_one = [False] * len(wanted)
        free = iter(devices)
        remainder = []
        for expert in falling:
            whole = self._whole(wanted[expert])
            for _ in range(whole):
                if has_one[expert] and not spare:
                    break
                device = next(free, None)
                if device is None:
                    break
                spare -= has_one[expert]
                device.take(expert, 1.0)
                has_one[expert] = True
            rest = wanted[expert] - floor(wanted[expert] + ROUNDING_ERROR) if has_one[expert] else wanted[expert]
            if not has_one[expert] or (self.rounding == "floor" and rest > ROUNDING_ERROR):
                remainder.append((rest, expert))
        for load, expert in sorted(remainder, key=lambda item: (-item[0], item[1])):
            if has_one[expert] and not spare:
                continue
            chosen = self._device_for(expert, load, devices, must=not has_one[expert])
            if chosen is not None:
                spare -= has_one[expert]
                chosen.take(expert, load)
                has_one[expert] = True
        if self.fill:
            self._fill(wanted, devices)
        slots = tuple((*d.experts, *[EMPTY] * (slots_per_device - len(d.experts))) for d in devices)
        return Placement(len(wanted), slots)

    def _fill(self, wanted: list[float], devices: "list[_Device]") -> None:
        """Replica by replica for the expert with most load a replica, on the device with the fewest experts that may take it."""
        replicas = [sum(expert in d.experts for d in devices) for expert in range(len(wanted))]
        heap = [(-load / n, expert) for expert, (load, n) in enumerate(zip(wanted, replicas, strict=True))]
        heapify(heap)
        while heap:
            _, expert = heappop(heap)
            may = [d for d in devices if d.open_for(expert, self.most_per_device)]
            if may:
                min(may, key=lambda d: (len(d.experts), d.load, d.number)).take(expert, 0.0)
                replicas[expert] += 1
                heappush(heap, (-wanted[expert] / replicas[expert], expert))

    def _whole(self, wanted: float) -> int:
        """Whole devices."""
        if wanted < 1 - ROUNDING_ERROR:
            return 0
        rounded: Callable[[float], int] = {"floor": floor, "nearest": lambda n: floor(n + 0.5), "ceil": ceil}[self.rounding]
        return rounded(wanted + (-ROUNDING_ERROR if self.rounding == "ceil" else ROUNDING_ERROR))

    def _device_for(self, expert: int, load: float, devices: "list[_Device]", *, must: bool) -> "_Device | None":
        """The first with room; else the least loaded with a free slot.  `must`: the expert has no slot yet."""
        usual = []
        for device in devices:
            if device.open_for(expert, self.most_per_device):
                if 0 < load <= self.capacity + ROUNDING_ERROR - device.load:
                    return device
                usual.append(device)
        if not usual and must:
            usual = [d for d in devices if d.open_for(expert, d.num_slots)]
        return min(usual, key=lambda d: (d.load, len(d.experts), d.number)) if usual else None


class _Device:
    """What a device holds so far."""

    __slots__ = ("number", "num_slots", "experts", "load")

    def __init__(self, number: int, num_slots: int):
        self.number, self.num_slots, self.load = number, num_slots, 0.0
        self.experts: list[int] = []

    def open_for(self, expert: int, most: int) -> bool:
        return len(self.experts) < min(most, self.num_slots) and expert not in self.experts

    def take(self, expert: int, load: float) -> None:
        self.experts.append(expert)
        self.load += load
