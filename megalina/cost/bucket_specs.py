"""The gradient buckets of one rank, by arithmetic: what `megalina/parallel/buckets.py` builds, for whoever has no model.

A program needs them, and so does whoever asks how large a rank is, also of models that no machine here could hold.
"""

from collections.abc import Iterator
from math import prod

from megalina.config import ModelConfig, PretrainConfig
from megalina.layout import axis_of_group, axis_sizes
from megalina.parameters import BYTES, is_moe_layer, padded_vocab_size
from megalina.step.forward import Shape
from megalina.step.program import BucketSpec

ALIGNMENT = 16  # elements; of each parameter, as in the buckets themselves


def bucket_specs(
    config: PretrainConfig, world: int, *, vocab_size: int, packing: int = 1, piece_bytes: int = 0
) -> dict[str, BucketSpec]:
    """Group -> its bucket, in the trainer's order: a group stands at its last parameter, the model's last parameter is first.
    `vocab_size`: before padding; `piece_bytes`: as in a `Plan`."""
    sizes = axis_sizes(world, tp=config.parallel.tp, ep=config.parallel.ep, packing=packing)
    numels: dict[str, int] = {}
    for group, shape in _parameters(config, vocab_size, sizes):
        numels[group] = numels.pop(group, 0) + _up(prod(shape), ALIGNMENT)
    out = {}
    for group, numel in reversed(numels.items()):
        axis = axis_of_group(group)
        sharded = config.parallel.zero == 1 and sizes[axis] > 1
        grain = ALIGNMENT * (sizes[axis] if sharded else 1)
        piece = piece_bytes // max(BYTES[config.train.dtype], 4)
        out[group] = BucketSpec(_up(numel, grain), axis, sharded, max(grain, piece // grain * grain) if piece else None)
    return out


def _parameters(config: PretrainConfig, vocab_size: int, sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The group and the shape of each parameter of one rank, in the model's order."""
    model, tp = config.model, sizes["tp"]
    width, moe = model.d_model, tuple(is_moe_layer(model, i) for i in range(model.num_layers))
    names = Shape(moe, tied=model.tie_embeddings, tp=tp > 1)
    words = padded_vocab_size(vocab_size, tp) // tp
    yield "embedding", (words, width)
    if not model.tie_embeddings:
        yield names.head, (words, width)
    if model.positions == "learned":
        yield names.ends, (model.max_positions or config.train.seq_len, width)
    for layer, is_moe in enumerate(moe):
        dense, copied, experts = names.dense(layer), names.copied(layer), f"experts.{layer}"
        yield from ((copied, shape) for shape in _norm(model))
        head_dim = model.head_dim or width // model.num_heads
        q, kv = model.num_heads * head_dim // tp, model.num_kv_heads * head_dim // tp
        yield from ((dense, shape) for shape in ((q, width), (kv, width), (kv, width), (width, q)))
        if model.bias:
            yield from ((dense, shape) for shape in ((q,), (kv,), (kv,)))
            yield copied, (width,)
        if model.qk_norm:
            yield from ((copied, (head_dim,)) for _ in range(2))
        yield from ((copied, shape) for shape in _norm(model))
        if is_moe:
            if config.router.kind != "hash":
                yield copied, (model.num_experts, width)
            here = model.num_experts // sizes["ep"]
            yield from ((experts, (here, *shape)) for shape in _mlp(model, model.d_ff))
            if model.shared_d_ff:
                yield from ((copied, shape) for shape in _mlp(model, model.shared_d_ff))
        else:
            *cut, last = _mlp(model, (model.dense_d_ff or config.router.top_k * model.d_ff) // tp)
            yield from ((dense, shape) for shape in cut)
            yield copied if model.bias else dense, last  # the output's bias is added after the sum over tp
    yield from ((names.ends, shape) for shape in _norm(model))


def _norm(model: ModelConfig) -> list[tuple[int, ...]]:
    return [(model.d_model,)] * (1 if model.norm == "rmsnorm" else 2)


def _mlp(model: ModelConfig, width: int) -> list[tuple[int, ...]]:
    """The output's bias comes last."""
    rows = width * (2 if model.activation == "swiglu" else 1)
    biases: list[tuple[int, ...]] = [(rows,), (model.d_model,)] if model.bias else []
    return [(rows, model.d_model), (model.d_model, width), *biases]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
