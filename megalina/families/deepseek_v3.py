"""DeepSeek-V3 (arXiv:2412.19437; DeepseekV3ForCausalLM of transformers), and of the same form Moonlight and Kimi-K2: latent
attention, sigmoid scores with a selection bias within groups, shared experts, multi-token prediction."""

from collections.abc import Iterator
from typing import Any

from megalina.families.decoder import decoder_config, decoder_links, decoder_model, feed_links
from megalina.families.family import Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.shared_experts import (
    MtpFamily,
    bias_links,
    expert_fields,
    expert_settings,
    latent_fields,
    latent_links,
    latent_settings,
    mtp_layers,
    mtp_links,
    shared_links,
    sigmoid_fields,
    sigmoid_router,
)


class DeepseekV3(MtpFamily):
    name = "deepseek_v3"
    model_types = ("deepseek_v3", "kimi_k2")
    architecture = "DeepseekV3ForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("rope_interleave", True, why="turned rows are sorted, since they are pairs of neighbours")
        router = sigmoid_router(fields, top_k=8, scale=2.5, groups=8, groups_per_token=4, renormalize=True)
        own = latent_settings(fields) | expert_settings(fields, experts=256, shared=1, dense=3, d_ff=2048)
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, mtp_layers=mtp_layers(fields), **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        own = {"rope_interleave": True, "num_nextn_predict_layers": settings.model.mtp_layers}
        return decoder_config(settings) | latent_fields(settings) | expert_fields(settings) | sigmoid_fields(settings) | own

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, latent_links, feed_links, shared_links, bias_links, mtp_links)
