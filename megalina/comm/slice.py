"""A slice: what one rank holds of a tensor, and where that sits in the whole tensor.

Checkpoints hold whole tensors and know no mesh.  A rank describes its part as boxes, n-dimensional intervals of the
whole, so that any layout can read what any other has written.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalina.mesh import Axis, Mesh


@dataclass(frozen=True, slots=True)
class Slice:
    """`local` is this rank's part of a tensor that is cut evenly; ranks along axes that are not named hold copies.

    `sharded` maps axis names of the mesh to dims; several axes on one dim cut it one after the other, in their order.
    With `shape`, `local` is flat: elements `start`, `start` + 1, ... of the row-major order of this rank's part, which
    has that shape.  The ranks of an axis may then hold different pieces of what they would else hold copies of, as
    ZeRO-1 does; together they must hold every element, and a piece is the same on two ranks or apart.
    `length` maps dims to the length of the whole tensor where rows beyond it are padding, neither saved nor loaded.
    `order` says of the dim that ep cuts which index of the whole tensor is in each place; (): index i in place i.
    """

    local: Tensor
    sharded: Mapping[str, int]
    shape: tuple[int, ...] | None = None
    start: int = 0
    length: Mapping[int, int] = field(default_factory=dict)
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Box:
    offsets: tuple[int, ...]  # within the whole tensor
    data: Tensor  # view into the slice; its shape is the box's


def whole_shape(part: Slice, mesh: Mesh) -> tuple[int, ...]:
    shape = list(_part_shape(part))
    for name, dim in part.sharded.items():
        shape[dim] *= _axis(mesh, name).size
    for dim, length in part.length.items():
        shape[dim] = length
    return tuple(shape)


def boxes(part: Slice, mesh: Mesh) -> list[Box]:
    """What `part` covers of the whole tensor: one box, or several where it is a flat piece; none if it is empty."""
    shape = _part_shape(part)
    index = [0] * len(shape)
    for name, dim in part.sharded.items():
        axis = _axis(mesh, name)
        index[dim] = index[dim] * axis.size + axis.rank
    corner = [i * size for i, size in zip(index, shape, strict=True)]
    if part.shape is None:
        pieces = [((0,) * len(shape), part.local)]
    else:
        pieces, position = [], 0
        for offsets, sizes in span(shape, part.start, part.start + part.local.numel()):
            count = math.prod(sizes)
            pieces.append((offsets, part.local[position : position + count].view(sizes)))
            position += count
    result: list[Box] = []
    for inner, data in pieces:
        offsets = tuple(c + o for c, o in zip(corner, inner, strict=True))
        for dim, length in part.length.items():
            data = data.narrow(dim, 0, max(0, min(data.shape[dim], length - offsets[dim])))
        if data.numel():
            result += _in_order(Box(offsets, data), part) if part.order else [Box(offsets, data)]
    return result


def _in_order(box: Box, part: Slice) -> Iterator[Box]:
    """The box cut along the dim that ep cuts, each piece where the whole tensor has it."""
    dim = part.sharded["ep"]
    for i in range(box.data.shape[dim]):
        offsets = list(box.offsets)
        offsets[dim] = part.order[offsets[dim] + i]
        yield Box(tuple(offsets), box.data.narrow(dim, i, 1))


def span(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements `start` to `stop` of a row-major tensor into boxes (offsets, sizes), in that order: the rest of a
    row, whole rows, the beginning of a row, and so on inwards."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    row = start // inner
    if start % inner:
        end = min(stop, (row + 1) * inner)
        for offsets, sizes in span(shape[1:], start - row * inner, end - row * inner):
            yield (row, *offsets), (1, *sizes)
        row, start = row + 1, end
    rows = (stop - start) // inner
    if rows:
        yield (row, *[0] * (len(shape) - 1)), (rows, *shape[1:])
    row += rows
    for offsets, sizes in span(shape[1:], 0, stop - start - rows * inner):
        yield (row, *offsets), (1, *sizes)


def _part_shape(part: Slice) -> tuple[int, ...]:
    return tuple(part.local.shape) if part.shape is None else part.shape


def _axis(mesh: Mesh, name: str) -> Axis:
    axis: Axis = getattr(mesh, name)
    return axis


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one tensor: where it is saved from or loaded into."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    boxes: list[Box]
