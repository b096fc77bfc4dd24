"""Mixtral (arXiv:2401.04088; MixtralForCausalLM of transformers): softmax over all experts, the best of them renormalised."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import attention_links, decoder_config, decoder_links, decoder_model, feed_links
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.windows import window


class Mixtral(Family):
    name = "mixtral"
    model_types = ("mixtral",)
    architecture = "MixtralForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("router_jitter_noise", 0, why="tokens reach the router as they are")
        own: dict[str, Any] = {
            "num_kv_heads": fields.whole("num_key_value_heads", 8),
            "num_experts": fields.whole("num_local_experts", 8, also="num_experts"),
            "d_ff": fields.whole("intermediate_size"),
            "window": window(fields),
        }
        router = RouterConfig(
            top_k=fields.whole("num_experts_per_tok", 2), balance_loss=fields.number("router_aux_loss_coef", 0.001)
        )
        return Settings(decoder_model(fields, eps=1e-5, theta=1e6, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        return decoder_config(settings) | {
            "intermediate_size": settings.model.d_ff,
            "num_local_experts": settings.model.num_experts,
            "num_experts_per_tok": settings.router.top_k,
            "router_aux_loss_coef": settings.router.balance_loss,
            "sliding_window": settings.model.window or None,
        }

    def links(self, settings: Settings) -> Iterator[Link]:
        feed = partial(feed_links, at="block_sparse_moe.", names=("w1", "w3", "w2"))
        return decoder_links(settings, attention_links, feed)
