"""Splits: how many of each rank's rows for each expert go to each device that holds it; whole rows, none lost.

    even         the same number to each replica, whatever else a device has to do
    load_aware   such that the largest load of a device is as small as the placement allows
    local_first  as small, and of such splits one where ranks keep many rows for experts that they hold themselves

All take rows `count_RE`, int64 [R, E], and a placement, and give int64 [R, E, N], whose sum over N is `count_RE`.  Rank r is
device r, so R = N.  ValueError for other shapes or negative counts.  Equal inputs give equal splits: integers, ties to the
lower device.

Shapes: R source ranks, N devices, E experts, M of them with several replicas, C replicas of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalina.placement.placement import EMPTY, Placement

Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


def device_load(split_REN: Counts) -> Counts:
    """Rows that each device computes, [N]."""
    return split_REN.sum((0, 1))


def even(count_RE: Counts, placement: Placement) -> Counts:
    """Each rank's rows for an expert in parts that differ by 1 at most; so do their sums over ranks.

    Lina's split (section 5.2), and what `FirstFit` and `greedy` count on."""
    count_RE, held_EN = _checked(count_RE, placement)
    several_M = np.flatnonzero(held_EN.sum(1) > 1)
    count_RM, held_MN = count_RE[:, several_M], held_EN[several_M]
    replicas_M = held_MN.sum(1)
    least_RM, rest_RM = np.divmod(count_RM, replicas_M)
    # The rest of a rank goes on where that of the rank before has ended; experts begin at different replicas.
    begin_RM = (rest_RM.cumsum(0) - rest_RM + several_M) % replicas_M
    turn_RMN = (held_MN.cumsum(1) - 1 - begin_RM[:, :, None]) % replicas_M[:, None]
    split_RMN = (least_RM[:, :, None] + (turn_RMN < rest_RM[:, :, None])) * held_MN
    return _with_singles(split_RMN, several_M, count_RE, held_EN)


def load_aware(count_RE: Counts, placement: Placement) -> Counts:
    """The largest load of a device is as small as the placement allows, exactly; it does not matter where rows come from.

    Water-filling, expert by expert, then exchange along shortest paths between devices: a maximum flow."""
    count_RE, held_EN = _checked(count_RE, placement)
    several_M = np.flatnonzero(held_EN.sum(1) > 1)
    load_MN = _balanced(count_RE, held_EN, several_M, np.zeros((len(several_M), placement.num_devices), np.int64))
    return _with_singles(_overlaps(count_RE[:, several_M], load_MN), several_M, count_RE, held_EN)


def local_first(count_RE: Counts, placement: Placement) -> Counts:
    """A rank keeps its rows for experts that it holds, as far as the largest load stays as small as with `load_aware`.

    Near the most rows that can be kept, not exactly that: with skewed counts mostly 98% or more of it.  After Libra (ICLR 2026),
    as an idea."""
    count_RE, held_EN = _checked(count_RE, placement)
    several_M = np.flatnonzero(held_EN.sum(1) > 1)
    count_RM = count_RE[:, several_M]
    own_MN = np.where(held_EN[several_M], count_RM.T, 0)
    load_MN = _balanced(count_RE, held_EN, several_M, own_MN)
    kept_MN = np.minimum(load_MN, own_MN)
    split_RMN = _overlaps(count_RM - kept_MN.T, load_MN - kept_MN)
    devices = np.arange(placement.num_devices)
    split_RMN[devices, :, devices] += kept_MN.T
    return _with_singles(split_RMN, several_M, count_RE, held_EN)


def _checked(count_RE: Counts, placement: Placement) -> tuple[Counts, Mask]:
    """The counts as int64, and which device holds which expert [E, N]."""
    shape = (placement.num_devices, placement.num_experts)
    if count_RE.shape != shape:
        raise ValueError(f"rows have shape {count_RE.shape}: (ranks, experts) of the placement are {shape}")
    if count_RE.dtype.kind not in "iu" or count_RE.min() < 0:
        raise ValueError(f"rows are counts of type {count_RE.dtype}, at least {count_RE.min()}: give integers from 0 on")
    held_EN = np.zeros((placement.num_experts + 1, placement.num_devices), np.bool_)
    slots_NS = np.asarray(placement.slots)
    assert EMPTY == -1  # the last row, which is cut off
    held_EN[slots_NS, np.arange(placement.num_devices)[:, None]] = True
    return count_RE.astype(np.int64, copy=False), held_EN[:-1]


def _with_singles(split_RMN: Counts, several_M: Counts, count_RE: Counts, held_EN: Mask) -> Counts:
    """[R, E, N]: the split of experts with several replicas, and all rows of the others where these sit."""
    split_REN = np.zeros((len(count_RE), *held_EN.shape), np.int64)
    single_E = held_EN.sum(1) == 1
    split_REN[:, single_E, held_EN.argmax(1)[single_E]] = count_RE[:, single_E]
    split_REN[:, several_M] = split_RMN
    return split_REN


def _balanced(count_RE: Counts, held_EN: Mask, several_M: Counts, own_MN: Counts) -> Counts:
    """Rows of each expert with several replicas on each device, [M, N], with the smallest largest load of a device.

    `own_MN`: rows that their own rank could compute; they are moved to others last."""
    count_E = count_RE.sum(0)
    single_E = held_EN.sum(1) == 1
    single_N = count_E[single_E] @ held_EN[single_E]
    replicas = [np.flatnonzero(held_N).tolist() for held_N in held_EN[several_M]]
    held = [np.flatnonzero(held_M).tolist() for held_M in held_EN[several_M].T]
    limit = max(-(-int(count_E.sum()) // len(single_N)), int(single_N.max()))
    while True:
        state = _Loads(limit, (single_N + own_MN.sum(0)).tolist(), own_MN.tolist(), own_MN.tolist(), replicas, held)
        state.fill((count_E[several_M] - own_MN.sum(1)).tolist())
        state.balance()
        if state.limit == limit or not own_MN.any():
            return np.asarray(state.rows, np.int64).reshape(own_MN.shape)
        limit = state.limit  # once more: with too low a limit own rows were given away that may stay


@dataclass(slots=True)
class _Loads:
    """Loads while they are being balanced.  Lists, since experts with several replicas are few: numpy would be slower."""

    limit: int  # lower bound of the largest load
    total: list[int]  # of each device
    rows: list[list[int]]  # [M][N]
    own: list[list[int]]  # [M][N]
    replicas: list[list[int]]  # devices of each expert
    held: list[list[int]]  # experts of each device

    def fill(self, rest: list[int]) -> None:
        """Pour the rest of each expert over its devices like water, the largest a replica first."""
        for expert in sorted(range(len(rest)), key=lambda m: -(rest[m] // len(self.replicas[m]))):
            devices, rows = self.replicas[expert], self.rows[expert]
            for device, more in zip(devices, _water([self.total[d] for d in devices], rest[expert]), strict=True):
                rows[device] += more
                self.total[device] += more

    def balance(self) -> None:
        """Move rows between replicas until the largest load is as small as can be.

        Rows go from devices above the limit, over others, to devices below it, along a path of replicas.  Where no device
        below can be reached, those that are reached hold rows of no expert that sits elsewhere: their mean load is a lower
        bound, and the new limit."""
        while max(self.total) > self.limit:
            path, reached = self._path()
            if not path:
                self.limit = max(self.limit + 1, -(-sum(self.total[d] for d in reached) // len(reached)))
                continue
            hops = list(zip(path, path[1:], strict=False))
            shared = [[m for m in self.held[a] if m in self.held[b] and self.rows[m][a]] for a, b in hops]
            most = min(sum(self.rows[m][a] for m in experts) for (a, _), experts in zip(hops, shared, strict=True))
            rows = min(most, self.total[path[0]] - self.limit, self.limit - self.total[path[-1]])
            for (a, b), experts in zip(hops, shared, strict=True):
                self._move(experts, a, b, rows)
            self.total[path[0]] -= rows
            self.total[path[-1]] += rows

    def _path(self) -> tuple[list[int], list[int]]:
        """A shortest path from a device above the limit to one below, or an empty one, and the devices reached until then."""
        reached = [d for d, load in enumerate(self.total) if load > self.limit]
        before = dict.fromkeys(reached, -1)
        for a in reached:  # grows meanwhile
            for m in self.held[a]:
                if not self.rows[m][a]:
                    continue
                for b in self.replicas[m]:
                    if b in before:
                        continue
                    before[b] = a
                    reached.append(b)
                    if self.total[b] < self.limit:
                        path = [b]
                        while before[path[-1]] >= 0:
                            path.append(before[path[-1]])
                        return path[::-1], reached
        return [], reached

    def _move(self, experts: list[int], a: int, b: int, rows: int) -> None:
        """Rows of some experts from device a to b: first what b's own rank sends, then what neither does, then a's own."""
        for gain in (True, False, None):
            for m in experts:
                if not rows:
                    return
                here, own = self.rows[m], self.own[m]
                taken = min(rows, here[a] if gain is None else max(0, here[a] - own[a]))
                if gain:
                    taken = min(taken, max(0, own[b] - here[b]))
                here[a] -= taken
                here[b] += taken
                rows -= taken


def _water(load_C: Sequence[int], rows: int) -> list[int]:
    """Rows for each of some devices, so that the least loaded become equal; the last rows go to the lower ones."""
    rising = sorted(range(len(load_C)), key=lambda c: load_C[c])
    below = 0  # load of the devices that get rows
    for number, c in enumerate(rising, start=1):
        below += load_C[c]
        if number == len(rising) or rows + below <= number * load_C[rising[number]]:
            break
    level, more = divmod(rows + below, number)
    added_C = [0] * len(load_C)
    for place, c in enumerate(sorted(rising[:number])):
        added_C[c] = level + (place < more) - load_C[c]
    return added_C


def _overlaps(count_RM: Counts, load_MN: Counts) -> Counts:
    """Rows of an expert in the order of ranks, dealt out in the order of devices, [R, M, N]."""
    rank_end_RM, device_end_MN = count_RM.cumsum(0), load_MN.cumsum(1)
    end_RMN = np.minimum(rank_end_RM[:, :, None], device_end_MN)
    begin_RMN = np.maximum((rank_end_RM - count_RM)[:, :, None], device_end_MN - load_MN)
    return np.maximum(end_RMN - begin_RMN, 0)
