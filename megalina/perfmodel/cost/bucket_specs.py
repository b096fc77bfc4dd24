"""The gradient buckets of one rank, by arithmetic: what `megalina/parallel/buckets.py` builds, without a model.

A program needs them, and so does the question how large a rank is, also of models that no machine here could hold.
"""

from math import prod

from megalina.blocks.model import blocks_of
from megalina.config import BYTES, PretrainConfig, padded_vocab_size
from megalina.layout import axis_of_group, axis_sizes
from megalina.step.program import BucketSpec

ALIGNMENT = 16  # elements, of each parameter; grouped matrix products want rows at multiples of 16 bytes


def bucket_specs(
    config: PretrainConfig, world: int, *, vocab_size: int, packing: int = 1, piece_bytes: int = 0
) -> dict[str, BucketSpec]:
    """Group -> its bucket, in the trainer's order: a group stands at its last parameter, the model's last parameter is first.
    `vocab_size`: before padding; `piece_bytes`: as in a `Plan`."""
    tp = config.parallel.tp
    sizes = axis_sizes(world, tp=tp, ep=config.parallel.ep // packing)
    blocks = blocks_of(
        config.model,
        config.router,
        vocab_size=vocab_size,
        padded_vocab=padded_vocab_size(vocab_size, tp),
        max_positions=config.model.max_positions or config.train.seq_len,
    )
    numels: dict[str, int] = {}
    for layer, parameter in blocks.parameters():
        group = parameter.group(layer, tp=tp > 1)
        numels[group] = numels.pop(group, 0) + _up(prod(parameter.local_shape(sizes)), ALIGNMENT)
    out = {}
    for group, numel in reversed(numels.items()):
        axis = axis_of_group(group)
        sharded = config.parallel.zero == 1 and sizes[axis] > 1
        grain = ALIGNMENT * (sizes[axis] if sharded else 1)
        piece = piece_bytes // max(BYTES[config.train.dtype], 4)
        out[group] = BucketSpec(_up(numel, grain), axis, sharded, max(grain, piece // grain * grain) if piece else None)
    return out


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
