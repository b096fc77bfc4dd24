"""Qwen3-MoE (arXiv:2505.09388; Qwen3MoeForCausalLM of transformers): softmax over all experts, the best of them renormalised
where `norm_topk_prob` says so; some layers may be dense."""

from collections.abc import Iterator
from typing import Any

from megalina.families.decoder import (
    attention_links,
    decoder_config,
    decoder_links,
    decoder_model,
    feed_links,
    softmax_fields,
    softmax_router,
)
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.sparse_layers import sparse_fields, sparse_settings
from megalina.families.windows import window


class Qwen3Moe(Family):
    name = "qwen3_moe"
    model_types = ("qwen3_moe",)
    architecture = "Qwen3MoeForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("attention_bias", False, why="queries, keys and values have no biases")
        own: dict[str, Any] = {
            "num_kv_heads": fields.whole("num_key_value_heads", 4),
            "qk_norm": "head",
            "window": window(fields, switch="use_sliding_window"),
            **sparse_settings(fields, experts=128, d_ff=768),
        }
        router = softmax_router(fields, top_k=8, balance_loss=0.001)
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {"attention_bias": False, "use_sliding_window": False}
        return decoder_config(settings) | sparse_fields(settings) | softmax_fields(settings) | own

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, attention_links, feed_links)
