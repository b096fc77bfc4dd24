"""dots.llm1 (arXiv:2506.05767; Dots1ForCausalLM of transformers): grouped queries, normed queries and keys of each head, windows
in some layers, sigmoid scores with a selection bias within groups, shared experts."""

from collections.abc import Iterator
from typing import Any

from megalina.blocks.heads import attention_bias
from megalina.families.decoder import attention_links, decoder_config, decoder_links, decoder_model, feed_links
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.shared_experts import (
    bias_links,
    expert_fields,
    expert_settings,
    shared_links,
    sigmoid_fields,
    sigmoid_router,
)
from megalina.families.windows import FULL, SLIDING, layer_windows, window_fields


class Dots1(Family):
    name = "dots1"
    model_types = ("dots1",)
    architecture = "Dots1ForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        size = fields.whole_or_null("sliding_window", 4096)
        first, layers = fields.whole("max_window_layers", 62), fields.whole("num_hidden_layers")
        kinds = [SLIDING if size and layer >= first else FULL for layer in range(layers)]
        own: dict[str, Any] = {
            "num_kv_heads": fields.whole_or_null("num_key_value_heads", 32) or fields.whole("num_attention_heads"),
            "attention_bias": "all" if fields.flag("attention_bias", False) else "none",
            "qk_norm": "head",
            **layer_windows(fields, size, kinds),
            **expert_settings(fields, experts=None, shared=None, dense=0, d_ff=1408),
        }
        router = sigmoid_router(fields, top_k=None, scale=1.0, groups=1, groups_per_token=1, renormalize=False)
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {"attention_bias": attention_bias(settings.model) == "all"} | window_fields(settings)
        return decoder_config(settings) | expert_fields(settings) | sigmoid_fields(settings) | own

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, attention_links, feed_links, shared_links, bias_links)
