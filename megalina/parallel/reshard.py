"""Resharding: tensors from one layout to another, from memory to memory.

The slices with which checkpoints describe what a rank holds say it here too, so weights, optimizer moments, master weights
and router biases all go the same way, sharded by ZeRO-1 or not.  Bits are copied, nothing is computed.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megalina.collective_log import CollectiveLog
from megalina.comm.exchange import start_all_to_all
from megalina.comm.slice import Box, Slice, boxes, whole_shape
from megalina.groups import is_gloo
from megalina.mesh import Mesh, all_gather_object

Place = tuple[tuple[int, ...], tuple[int, ...]]  # a box in the whole tensor: offsets, sizes
Slices = Mapping[str, Sequence[Slice]]


@dataclass(frozen=True, slots=True)
class Parcel:
    """A part of one tensor that travels."""

    sender: int
    receiver: int
    have: Place  # the sender's box that it is cut from
    want: Place  # the receiver's box that it belongs to
    common: Place


def move(old: Slices, old_mesh: Mesh, new: Slices, new_mesh: Mesh, log: CollectiveLog) -> int:
    """Fill `new` with what the ranks hold in `old`; returns the bytes that this rank has sent.  All ranks call it alike.

    What a rank holds itself it copies.  What it lacks comes from one of the nearest ranks that hold it, in one all-to-all a
    dtype.  Ranks of other stages of a pipeline hold other tensors.

    ValueError where `old` and `new` are not the same tensors in name, shape and dtype, or nobody holds a part of one.
    """
    shapes = _same_shapes(old, old_mesh, new, new_mesh)
    held = {name: _by_place(parts, old_mesh) for name, parts in old.items()}
    wanted = {name: _by_place(parts, new_mesh) for name, parts in new.items()}
    missing = {name: _copy_own(shapes[name], held[name], wanted[name]) for name in new}  # elements
    own = {name: old[name][0].local.dtype for name, count in missing.items() if count}
    dtype_of = {name: dtype for of_rank in all_gather_object(new_mesh, own) for name, dtype in of_rank.items()}
    lacking = sorted(dtype_of)
    here = [(list(held.get(name, ())), list(wanted.get(name, ()))) for name in lacking]
    everybody = all_gather_object(new_mesh, here) if lacking else []
    by_dtype: dict[torch.dtype, list[int]] = defaultdict(list)
    for i, name in enumerate(lacking):
        by_dtype[dtype_of[name]].append(i)
    world, sent_bytes = new_mesh.world, 0
    wire = torch.device("cpu" if world.group is None or is_gloo(world.group) else "cuda")
    device = next((part.local.device for parts in old.values() for part in parts), wire)  # this rank may have nothing of them
    for dtype in sorted(by_dtype, key=str):
        out: list[list[Tensor]] = [[] for _ in everybody]
        into: list[list[Tensor]] = [[] for _ in everybody]
        for i in by_dtype[dtype]:
            name = lacking[i]
            if name not in new:
                continue
            there, needed = zip(*(of_rank[i] for of_rank in everybody), strict=True)
            for parcel in parcels(shapes[name], there, needed, world.rank):
                if parcel.sender == world.rank:
                    out[parcel.receiver].append(_cut(held[name][parcel.have], parcel.common).reshape(-1))
                else:
                    into[parcel.sender].append(_cut(wanted[name][parcel.want], parcel.common))
                    missing[name] -= math.prod(parcel.common[1])
            if missing[name]:
                raise ValueError(f"{name}: no rank holds {missing[name]} of the elements that rank {world.rank} needs")
        nothing = torch.empty(0, dtype=dtype, device=device)
        flat = torch.cat([nothing, *(t for parts in out for t in parts)])
        send, receive = ([sum(t.numel() for t in parts) for parts in side] for side in (out, into))
        arrived = start_all_to_all(flat, send, receive, world, log).wait()
        targets = [t for parts in into for t in parts]
        for target, values in zip(targets, arrived.split([t.numel() for t in targets]), strict=True):
            target.copy_(values.view(target.shape))
        sent_bytes += flat.nbytes
    return sent_bytes


def parcels(
    shape: Sequence[int], held: Sequence[Collection[Place]], wanted: Sequence[Collection[Place]], me: int
) -> Iterator[Parcel]:
    """What of a tensor of this shape goes to and comes from rank `me`, by what each rank has and needs.

    Between any two ranks it is the same, in the same order, on both of them.  Boxes of two ranks are the same or apart."""
    owners: dict[Place, list[int]] = {}
    for rank, places in enumerate(held):
        for place in places:
            owners.setdefault(place, []).append(rank)
    all_boxes, own_boxes = _Boxes(shape, owners), _Boxes(shape, held[me])
    turn = {place: i for i, place in enumerate(all_boxes.places)}
    for receiver, places in enumerate(wanted):
        for want in places:
            for have, common in (all_boxes if receiver == me else own_boxes).overlapping(want):
                if receiver not in owners[have]:  # else it has copied it
                    sender = _sender(owners[have], receiver, turn[have])
                    if me in (sender, receiver):
                        yield Parcel(sender, receiver, have, want, common)


def _sender(owners: Sequence[int], receiver: int, turn: int) -> int:
    """One of the nearest, which take turns.  Ranks of a node are neighbours: their numbers differ in the low bits alone."""
    nearest = min((owner ^ receiver).bit_length() for owner in owners)
    near = [owner for owner in owners if (owner ^ receiver).bit_length() == nearest]
    return near[(receiver + turn) % len(near)]


class _Boxes:
    """Places in one tensor, in the order of their first elements, found by what they overlap."""

    def __init__(self, shape: Sequence[int], places: Iterable[Place]):
        self._strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        self.places = sorted(places, key=self._first)
        self._firsts = [self._first(place) for place in self.places]
        self._reach = list(accumulate((self._last(place) for place in self.places), max))

    def overlapping(self, want: Place) -> Iterator[tuple[Place, Place]]:
        """(place, what it has in common with `want`)"""
        i = bisect_right(self._firsts, self._last(want))
        while i > 0 and self._reach[i - 1] >= self._first(want):
            i -= 1
            if common := overlap(self.places[i], want):
                yield self.places[i], common

    def _first(self, place: Place) -> int:
        return sum(offset * stride for offset, stride in zip(place[0], self._strides, strict=True))

    def _last(self, place: Place) -> int:
        return self._first(place) + sum((size - 1) * stride for size, stride in zip(place[1], self._strides, strict=True))


def overlap(a: Place, b: Place) -> Place | None:
    """The box that two boxes have in common."""
    starts = tuple(map(max, a[0], b[0]))
    sizes = tuple(min(x + n, y + m) - start for x, n, y, m, start in zip(*a, *b, starts, strict=True))
    return (starts, sizes) if all(size > 0 for size in sizes) else None


def _by_place(parts: Sequence[Slice], mesh: Mesh) -> dict[Place, Box]:
    return {(box.offsets, tuple(box.data.shape)): box for part in parts for box in boxes(part, mesh)}


def _copy_own(shape: Sequence[int], held: Mapping[Place, Box], wanted: Mapping[Place, Box]) -> int:
    """Copy what this rank has; returns how many elements it lacks."""
    missing, own = 0, _Boxes(shape, held)
    for want, target in wanted.items():
        missing += target.data.numel()
        for have, common in [(want, want)] if want in held else own.overlapping(want):
            _cut(target, common).copy_(_cut(held[have], common))
            missing -= math.prod(common[1])
    return missing


def _cut(box: Box, place: Place) -> Tensor:
    """The part of a box's data at a place inside of it, as a view."""
    return box.data[tuple(slice(start - o, start - o + size) for start, size, o in zip(*place, box.offsets, strict=True))]


def _same_shapes(old: Slices, old_mesh: Mesh, new: Slices, new_mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole tensors."""
    before, after = (
        {name: (whole_shape(parts[0], mesh), parts[0].local.dtype) for name, parts in side.items()}
        for side, mesh in ((old, old_mesh), (new, new_mesh))
    )
    for name in [*after, *before]:
        if before.get(name) != after.get(name):
            raise ValueError(
                f"{name} is {before.get(name, 'absent')} in the old layout, {after.get(name, 'absent')} in the new one"
            )
    return {name: shape for name, (shape, _) in after.items()}
