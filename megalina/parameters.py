"""Facts of a model that need no blocks: which layers are MoE, rows of the embedding, bytes of a number."""

from megalina.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}  # train.dtype -> of one number


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    above = layer - model.dense_layers_first
    return above >= 0 and above % model.moe_every == model.moe_every - 1


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: a multiple of 128 on each tensor-parallel rank."""
    return -(-vocab_size // (128 * tp)) * 128 * tp
