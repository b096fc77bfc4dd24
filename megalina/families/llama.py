"""Llama: a dense decoder, to be upcycled (LlamaForCausalLM of transformers)."""

from collections.abc import Iterator
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import (
    attention_links,
    decoder_config,
    decoder_model,
    end_links,
    layer_prefix,
    mlp_links,
    norm_links,
)
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link


class Llama(Family):
    name = "llama"
    model_types = ("llama",)
    architecture = "LlamaForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("attention_bias", False, why="queries, keys and values have no biases")
        fields.needs("mlp_bias", False, why="MLPs have no biases")
        layers, d_ff = fields.whole("num_hidden_layers"), fields.whole("intermediate_size")
        model = decoder_model(fields, eps=1e-6, theta=1e4, dense_layers_first=layers, dense_d_ff=d_ff)
        return Settings(model, RouterConfig())

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {"attention_bias": False, "mlp_bias": False, "intermediate_size": settings.dense_d_ff}
        return decoder_config(settings) | own

    def links(self, settings: Settings) -> Iterator[Link]:
        yield from end_links(settings)
        for layer in range(settings.model.num_layers):
            theirs, ours = layer_prefix(layer)
            yield from norm_links(layer, settings)
            yield from attention_links(layer, settings)
            yield from mlp_links(f"{theirs}mlp.", f"{ours}mlp", settings.model.d_model, settings.dense_d_ff)
