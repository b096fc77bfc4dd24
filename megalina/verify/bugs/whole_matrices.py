"""Bugs in the update of whole matrices, and in QK-clip."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from megalina.config import PretrainConfig
from megalina.model.init import local_shape
from megalina.parallel.buckets import Bucket, FlatSlice
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction, Matrices
from megalina.verify.bugs.change import Function, around, expert_buckets


def experts_flattened(trainable: Trainable, config: PretrainConfig) -> None:
    for name in expert_buckets(trainable):
        bucket = trainable.buckets[name]
        experts = local_shape(bucket.members[0].parameter)[0]
        bucket.slices = [_flattened(s, experts) for s in bucket.slices]


def _flattened(place: FlatSlice, experts: int) -> FlatSlice:
    """A row for each expert."""
    if place.matrices is None:
        return place
    return replace(place, matrices=Matrices(place.start, 1, experts, (place.stop - place.start) // experts))


def matrix_cut_by_shard(trainable: Trainable, config: PretrainConfig) -> None:
    """Every shard that ends at a matrix gets half of its rows, too."""
    for bucket in trainable.buckets.values():
        if bucket.layout.shares:
            stops = [_later(bucket, stop) for _, stop in bucket.layout.shares]
            shares = tuple(zip([0, *stops[:-1]], stops, strict=True))
            bucket.layout = replace(bucket.layout, shares=shares)
            bucket.slices = [*_parts_of_matrices(bucket, *shares[bucket.axis.rank]), *bucket.slices_of_own()]


def _later(bucket: Bucket, stop: int) -> int:
    for m in bucket.layout.matrices:
        if m.start <= stop < m.stop:
            return stop + m.rows // 2 * m.columns
    return stop


def _parts_of_matrices(bucket: Bucket, start: int, stop: int) -> Iterator[FlatSlice]:
    for m in bucket.layout.matrices:
        for first in range(m.start, m.stop, m.numel):
            low, high = max(start, first), min(stop, first + m.numel)
            if low < high and high - low < m.numel:
                yield FlatSlice(low, high, True, Matrices(low, 1, (high - low) // m.columns, m.columns))


def qk_clip_per_rank(trainable: Trainable, config: PretrainConfig) -> None:
    own: list[Tensor] = []

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name == "head_logits":

            def noted(*a: Any) -> Any:
                own[:] = [function(*a)]
                return own[0]

            return noted
        if instruction.name == "verdict":
            return lambda measured, divisor, logits: function(measured, divisor, own[0])
        return function

    around(trainable, of)
