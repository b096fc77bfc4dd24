"""DeepSeek-V2 (arXiv:2405.04434; DeepseekV2ForCausalLM of transformers): latent attention, softmax over all experts, the best of
all or of the best groups, shared experts."""

from collections.abc import Iterator
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import decoder_config, decoder_links, decoder_model, feed_links
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.shared_experts import (
    expert_fields,
    expert_settings,
    latent_fields,
    latent_links,
    latent_settings,
    shared_links,
)

GREEDY, LIMITED = "greedy", "group_limited_greedy"


class DeepseekV2(Family):
    name = "deepseek_v2"
    model_types = ("deepseek_v2",)
    architecture = "DeepseekV2ForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("mlp_bias", False, why="MLPs have no biases")
        fields.needs("norm_topk_prob", False, why="transformers ignores it, which DeepSeek's own code does not")
        fields.needs("scoring_func", "softmax", why="the router's scores are a softmax")
        fields.needs("topk_method", GREEDY, LIMITED, why="these are the ways of choosing experts")
        limited = fields.any("topk_method", GREEDY) == LIMITED
        groups: dict[str, Any] = {"num_groups": fields.whole("n_group", 1), "groups_per_token": fields.whole("topk_group", 1)}
        router = RouterConfig(
            kind="group_limited_softmax" if limited else "topk",
            top_k=fields.whole("num_experts_per_tok"),
            renormalize=False,
            scale=fields.number("routed_scaling_factor", 1.0),
            balance_loss=0.001,
            **(groups if limited else {}),
        )
        own = latent_settings(fields) | expert_settings(fields, experts=64, shared=2, dense=0, d_ff=1407)
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        router, limited = settings.router, settings.router.kind == "group_limited_softmax"
        return (
            decoder_config(settings)
            | latent_fields(settings)
            | expert_fields(settings)
            | {
                "topk_method": LIMITED if limited else GREEDY,
                "n_group": router.num_groups if limited else None,
                "topk_group": router.groups_per_token if limited else None,
            }
        )

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, latent_links, feed_links, shared_links)
