"""OLMoE (arXiv:2409.02060; OlmoeForCausalLM of transformers): softmax over all experts, the chosen ones' as they are; queries and
keys are normed before they are cut into heads."""

from collections.abc import Iterator
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import (
    attention_links,
    decoder_config,
    decoder_model,
    end_links,
    experts_links,
    layer_prefix,
    norm_links,
)
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link, same


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
        router = RouterConfig(
            top_k=fields.whole("num_experts_per_tok", 8),
            renormalize=fields.flag("norm_topk_prob", False),
            balance_loss=fields.number("router_aux_loss_coef", 0.01),
        )
        return Settings(decoder_model(fields, eps=1e-5, theta=1e4, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        return decoder_config(settings) | {
            "attention_bias": False,
            "clip_qkv": None,
            "intermediate_size": settings.model.d_ff,
            "num_experts": settings.model.num_experts,
            "num_experts_per_tok": settings.router.top_k,
            "norm_topk_prob": settings.router.renormalize,
            "router_aux_loss_coef": settings.router.balance_loss,
        }

    def links(self, settings: Settings) -> Iterator[Link]:
        model = settings.model
        yield from end_links(settings)
        for layer in range(model.num_layers):
            theirs, ours = layer_prefix(layer)
            theirs += "mlp."
            yield from norm_links(layer, settings)
            yield from attention_links(layer, settings)
            yield same(f"{theirs}gate.weight", f"{ours}router.weight", model.num_experts, model.d_model)
            yield from experts_links(f"{theirs}experts.", f"{ours}experts", model.num_experts, model.d_model, model.d_ff)
