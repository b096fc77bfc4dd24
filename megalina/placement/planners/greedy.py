"""Greedy: replicas for the experts with the highest load a replica, then the largest load first onto the least loaded device.

After EPLB (deepseek-ai/EPLB), as an algorithm; packing is LPT, longest processing time first.  Then the busiest device exchanges
experts with others while that lowers its load.  Assumes an even split over replicas.

Shapes: E experts.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

from megalina.placement.placement import EMPTY, Placement, scaled_share
from megalina.placement.predictors.predictor import Floats

MAX_EXCHANGES = 32
LEAST_GAIN = 1e-12  # an exchange must gain more, or rounding errors would go round in circles


def greedy(share_E: Floats, num_devices: int, slots_per_device: int, *, max_exchanges: int = MAX_EXCHANGES) -> Placement:
    """The placement for an expected share of rows [E]; all zero means uniform.  ValueError where experts lack room.

    All slots are used, but no device holds an expert twice.  At most `max_exchanges` times a pair of devices exchanges."""
    load_E = scaled_share(share_E, num_devices, slots_per_device).tolist()
    replicas_E = replicas(load_E, num_devices, num_devices * slots_per_device)
    devices = packed(load_E, replicas_E, num_devices, slots_per_device)
    exchange(devices, [load / n for load, n in zip(load_E, replicas_E, strict=True)], slots_per_device, max_exchanges)
    return Placement(len(load_E), tuple((*d, *[EMPTY] * (slots_per_device - len(d))) for d in devices))


def replicas(load_E: Sequence[float], num_devices: int, num_slots: int) -> list[int]:
    """Replicas of each expert: one, and each further slot for the highest load a replica; at most `num_devices` of an expert."""
    replicas_E = [1] * len(load_E)
    if num_devices == 1:
        return replicas_E
    heap = [(-load, expert) for expert, load in enumerate(load_E)]
    heapify(heap)
    for _ in range(num_slots - len(load_E)):
        if not heap:
            break
        expert = heap[0][1]
        replicas_E[expert] += 1
        if replicas_E[expert] == num_devices:
            heappop(heap)
        else:
            heapreplace(heap, (-load_E[expert] / replicas_E[expert], expert))
    return replicas_E


def packed(load_E: Sequence[float], replicas_E: Sequence[int], num_devices: int, slots_per_device: int) -> list[list[int]]:
    """The experts of each device: LPT, no expert twice on a device; each replica has an equal part of its expert's load."""
    part_E = [load / n for load, n in zip(load_E, replicas_E, strict=True)]
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    heap = [(0.0, device) for device in range(num_devices)]  # of those with a free slot: (load, device)
    for expert in sorted(range(len(load_E)), key=lambda e: -part_E[e]):
        chosen: list[tuple[float, int]] = []  # all replicas in one go, so the devices are distinct
        while len(chosen) < replicas_E[expert] and heap:
            chosen.append(heappop(heap))
        for load, device in chosen:
            devices[device].append(expert)
            if len(devices[device]) < slots_per_device:
                heappush(heap, (load + part_E[expert], device))
        for _ in range(replicas_E[expert] - len(chosen)):
            _make_room(expert, devices, part_E, slots_per_device)
            heap = [(sum(part_E[e] for e in d), i) for i, d in enumerate(devices) if len(d) < slots_per_device]
            heapify(heap)
    return devices


def exchange(devices: list[list[int]], part_E: Sequence[float], slots_per_device: int, max_exchanges: int) -> None:
    """Lower the largest load, in place.  The busiest device swaps one expert for a smaller one of another device, or moves one
    to a free slot; it tries the least loaded device first.  Ends where no pair of devices gains, or after `max_exchanges`."""
    held = [set(experts) for experts in devices]
    loads = [sum(part_E[e] for e in experts) for experts in devices]
    for _ in range(max_exchanges):
        busiest = min(range(len(loads)), key=lambda d: (-loads[d], d))
        for other in sorted(range(len(loads)), key=lambda d: (loads[d], d)):
            found = _best_pair(devices, held, part_E, busiest, other, (loads[busiest] - loads[other]) / 2, slots_per_device)
            if found is not None:
                break
        else:
            return
        given, taken = found
        devices[busiest].remove(given)
        devices[other].append(given)
        if taken != EMPTY:
            devices[other].remove(taken)
            devices[busiest].append(taken)
        for device in (busiest, other):
            held[device] = set(devices[device])
            loads[device] = sum(part_E[e] for e in devices[device])


def _best_pair(
    devices: list[list[int]],
    held: list[set[int]],
    part_E: Sequence[float],
    busiest: int,
    other: int,
    half_gap: float,
    slots_per_device: int,
) -> tuple[int, int] | None:
    """(given, taken) whose difference is nearest to half the gap between two devices; None where no pair gains.

    `taken` is EMPTY where the other device has a free slot and gives nothing."""
    if half_gap <= LEAST_GAIN:
        return None
    best, best_miss = None, half_gap - LEAST_GAIN
    takes = [(part_E[e], e) for e in devices[other] if e not in held[busiest]]
    if len(devices[other]) < slots_per_device:
        takes.append((0.0, EMPTY))
    for given in devices[busiest]:
        if given in held[other]:
            continue
        goal = part_E[given] - half_gap
        for part, taken in takes:
            miss = part - goal if part > goal else goal - part
            if miss < best_miss:
                best, best_miss = (given, taken), miss
    return best


def _make_room(expert: int, devices: list[list[int]], part_E: Sequence[float], slots_per_device: int) -> None:
    """One more replica where all devices with a free slot hold the expert already: another device gives one of its own away.

    There is one to give: the full device holds more experts than the one with a free slot, which holds `expert` besides."""
    open_devices = [d for d in range(len(devices)) if len(devices[d]) < slots_per_device]
    full = [d for d in range(len(devices)) if expert not in devices[d]]
    target = min(open_devices, key=lambda d: (sum(part_E[e] for e in devices[d]), d))
    source = min(full, key=lambda d: (sum(part_E[e] for e in devices[d]), d))
    given = min((e for e in devices[source] if e not in devices[target]), key=lambda e: (part_E[e], e))
    devices[source].remove(given)
    devices[target].append(given)
    devices[source].append(expert)
