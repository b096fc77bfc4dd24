"""Qwen2-MoE (arXiv:2407.10671; Qwen2MoeForCausalLM of transformers): as Qwen3-MoE, with biases of queries, keys and values, and a
shared expert behind a gate of its own."""

from collections.abc import Iterator
from typing import Any

from megalina.families.decoder import (
    attention_links,
    decoder_config,
    decoder_links,
    decoder_model,
    feed_links,
    layer_prefix,
    mlp_links,
    softmax_fields,
    softmax_router,
)
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link, same
from megalina.families.sparse_layers import sparse_fields, sparse_settings
from megalina.families.windows import refuse_layer_types, window


class Qwen2Moe(Family):
    name = "qwen2_moe"
    model_types = ("qwen2_moe",)
    architecture = "Qwen2MoeForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        refuse_layer_types(fields)
        own: dict[str, Any] = {
            "num_kv_heads": fields.whole("num_key_value_heads", 16),
            "attention_bias": "qkv" if fields.flag("qkv_bias", True) else "none",
            "window": window(fields, switch="use_sliding_window"),
            "shared_d_ff": fields.whole("shared_expert_intermediate_size", 5632),
            "shared_gate": True,
            **sparse_settings(fields, experts=60, d_ff=1408),
        }
        router = softmax_router(fields, top_k=4, balance_loss=0.001)
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {
            "qkv_bias": settings.model.attention_bias == "qkv",
            "use_sliding_window": False,
            "shared_expert_intermediate_size": settings.model.shared_d_ff,
        }
        return decoder_config(settings) | sparse_fields(settings) | softmax_fields(settings) | own

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, attention_links, feed_links, shared_links)


def shared_links(layer: int, settings: Settings) -> Iterator[Link]:
    """The shared expert and its gate."""
    theirs, ours = layer_prefix(layer)
    model = settings.model
    if settings.is_moe(layer):
        yield from mlp_links(f"{theirs}mlp.shared_expert.", f"{ours}shared", model.d_model, model.shared_d_ff)
        yield same(f"{theirs}mlp.shared_expert_gate.weight", f"{ours}shared.gate", 1, model.d_model)
