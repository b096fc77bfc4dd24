"""Llama: a dense decoder, to be upcycled (LlamaForCausalLM of transformers)."""

from collections.abc import Iterator
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import attention_links, decoder_config, decoder_links, decoder_model, feed_links
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
        return decoder_links(settings, attention_links, feed_links)
