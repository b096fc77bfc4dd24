"""DeepSeek-V3 (arXiv:2412.19437; DeepseekV3ForCausalLM of transformers), and of the same form Moonlight and Kimi-K2: latent
attention, sigmoid scores with a selection bias within groups, shared experts, multi-token prediction."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megalina.families import shared_experts
from megalina.families.decoder import decoder_config, decoder_model, end_links, norm_links
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.shared_experts import (
    expert_fields,
    expert_settings,
    feed_links,
    latent_fields,
    latent_links,
    latent_settings,
    mtp_copies,
    mtp_layers,
    mtp_links,
    sigmoid_fields,
    sigmoid_router,
    training_layers,
)


class DeepseekV3(Family):
    name = "deepseek_v3"
    model_types = ("deepseek_v3", "kimi_k2")
    architecture = "DeepseekV3ForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("rope_interleave", True, why="turned rows are sorted, since they are pairs of neighbours")
        router = sigmoid_router(fields, top_k=8, scale=2.5, groups=8, groups_per_token=4)
        own = latent_settings(fields) | expert_settings(fields, experts=256, shared=1, dense=3, d_ff=2048)
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, mtp_layers=mtp_layers(fields), **own), router)

    def present(self, settings: Settings, keys: Collection[str]) -> Settings:
        return shared_experts.present(settings, keys)

    def copies(self, settings: Settings) -> Mapping[str, str]:
        return {**super().copies(settings), **mtp_copies(settings)}

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {"rope_interleave": True, "num_nextn_predict_layers": settings.model.mtp_layers}
        return decoder_config(settings) | latent_fields(settings) | expert_fields(settings) | sigmoid_fields(settings) | own

    def links(self, settings: Settings) -> Iterator[Link]:
        yield from end_links(settings)
        for layer, moe in training_layers(settings):
            yield from norm_links(layer, settings)
            yield from latent_links(layer, settings)
            yield from feed_links(layer, moe, settings, biased=True)
            yield from mtp_links(layer, settings)
