"""Qwen3: a dense decoder that norms each head's queries and keys, to be upcycled (Qwen3ForCausalLM of transformers)."""

from collections.abc import Iterator
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import attention_links, decoder_config, decoder_links, decoder_model, feed_links
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.windows import refuse_layer_types, window


class Qwen3(Family):
    name = "qwen3"
    model_types = ("qwen3",)
    architecture = "Qwen3ForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("attention_bias", False, why="queries, keys and values have no biases")
        refuse_layer_types(fields)
        own: dict[str, Any] = {
            "head_dim": fields.whole("head_dim", 128),
            "num_kv_heads": fields.whole("num_key_value_heads", 32),
            "qk_norm": "head",
            "window": window(fields, switch="use_sliding_window"),
            "dense_layers_first": fields.whole("num_hidden_layers"),
            "dense_d_ff": fields.whole("intermediate_size"),
        }
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, **own), RouterConfig())

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {"attention_bias": False, "use_sliding_window": False, "intermediate_size": settings.dense_d_ff}
        return decoder_config(settings) | own

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, attention_links, feed_links)
