"""Resharding: the state of training as whole tensors of this rank's part of the model, and back.

A bucket's optimizer state lives in flat slices, which with ZeRO-1 are cut anywhere.  For a checkpoint each bucket's
slices are gathered; every rank of the bucket's axis then holds the whole of its parameters' state, in shapes that any
other layout can cut anew.  One bucket at a time, so the peak is one bucket above what a rank holds.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalina.comm.exchange import start_gather_in_place
from megalina.model.init import spec_of
from megalina.parallel.buckets import Bucket, Member


def gathered(bucket: Bucket, slices: Sequence[Tensor]) -> Tensor:
    """Flat [numel]: the bucket's state, from this rank's slices of it.  A collective where the bucket is sharded."""
    flat = torch.zeros(bucket.numel, dtype=slices[0].dtype if slices else bucket.dtype, device=bucket.grad.device)
    for place, own in zip(bucket.slices, slices, strict=True):
        flat[place.start : place.stop] = own
    if bucket.sharded:
        for piece in bucket.pieces:
            start_gather_in_place(flat[slice(*piece)], flat[bucket.own(piece)], bucket.axis).wait()
    return flat


def scatter(bucket: Bucket, flat: Tensor, slices: Sequence[Tensor]) -> None:
    """The way back: fill this rank's slices from the bucket's whole state."""
    for place, own in zip(bucket.slices, slices, strict=True):
        own.copy_(flat[place.start : place.stop])


def members_of(bucket: Bucket, flat: Tensor) -> Iterator[tuple[Member, Tensor]]:
    """Each parameter's part of a flat state, as a view in the dimensions that layouts cut."""
    for m in bucket.members:
        yield m, in_spec_shape(flat[m.start : m.stop], m.parameter)


def in_spec_shape(values: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a parameter (or of its state), in the dimensions of its spec."""
    spec = spec_of(parameter)
    if not spec.dims:
        return values.view(parameter.shape)
    # the dimensions before the last are merged in memory; the cut one is shorter here than on one device
    shape = list(spec.shape)
    whole = 1
    for n in spec.shape:
        whole *= n
    for dim in spec.sharded.values():
        shape[dim] = shape[dim] * values.numel() // whole
    return values.view(shape)
