"""OLMoE (arXiv:2409.02060; OlmoeForCausalLM of transformers): softmax over all experts, the chosen ones' as they are; queries and
keys are normed before they are cut into heads."""

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


class Olmoe(Family):
    name = "olmoe"
    model_types = ("olmoe",)
    architecture = "OlmoeForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("attention_bias", False, why="queries, keys and values have no biases")
        fields.needs("clip_qkv", why="queries, keys and values are not clipped")
        own: dict[str, Any] = {
            "qk_norm": "projection",
            "num_experts": fields.whole("num_experts", 64, also="num_local_experts"),
            "d_ff": fields.whole("intermediate_size"),
        }
        router = softmax_router(fields, top_k=8, balance_loss=0.01)
        return Settings(decoder_model(fields, eps=1e-5, theta=1e4, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {"attention_bias": False, "clip_qkv": None}
        experts = {"intermediate_size": settings.model.d_ff, "num_experts": settings.model.num_experts}
        return decoder_config(settings) | softmax_fields(settings) | own | experts

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, attention_links, feed_links)
