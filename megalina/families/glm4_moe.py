"""GLM-4.5 (arXiv:2508.06471; Glm4MoeForCausalLM of transformers): grouped queries of which half the numbers turn, sigmoid scores
with a selection bias, shared experts, multi-token prediction."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megalina.families import shared_experts
from megalina.families.decoder import attention_links, decoder_config, decoder_model, end_links, norm_links
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.shared_experts import (
    expert_fields,
    expert_settings,
    feed_links,
    mtp_copies,
    mtp_layers,
    mtp_links,
    sigmoid_fields,
    sigmoid_router,
    training_layers,
)


class Glm4Moe(Family):
    name = "glm4_moe"
    model_types = ("glm4_moe",)
    architecture = "Glm4MoeForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        own: dict[str, Any] = {
            "num_kv_heads": fields.whole("num_key_value_heads", 8),
            "attention_bias": "qkv" if fields.flag("attention_bias", False) else "none",
            "qk_norm": "head" if fields.flag("use_qk_norm", False) else "none",
            "mtp_layers": mtp_layers(fields),
            **expert_settings(fields, experts=128, shared=1, dense=1, d_ff=1408),
        }
        router = sigmoid_router(fields, top_k=8, scale=1.0, groups=1, groups_per_token=1)
        return Settings(decoder_model(fields, eps=1e-5, theta=1e4, rotary_fraction=0.5, **own), router)

    def present(self, settings: Settings, keys: Collection[str]) -> Settings:
        return shared_experts.present(settings, keys)

    def copies(self, settings: Settings) -> Mapping[str, str]:
        return {**super().copies(settings), **mtp_copies(settings)}

    def config(self, settings: Settings) -> dict[str, Any]:
        model = settings.model
        own = {
            "attention_bias": model.attention_bias == "qkv",
            "use_qk_norm": model.qk_norm == "head",
            "num_nextn_predict_layers": model.mtp_layers,
        }
        fields = decoder_config(settings) | expert_fields(settings) | sigmoid_fields(settings) | own
        fields["partial_rotary_factor"] = fields["rope_parameters"]["partial_rotary_factor"] = model.rotary_fraction
        return fields

    def links(self, settings: Settings) -> Iterator[Link]:
        yield from end_links(settings)
        for layer, moe in training_layers(settings):
            yield from norm_links(layer, settings)
            yield from attention_links(layer, settings)
            yield from feed_links(layer, moe, settings, biased=True)
            yield from mtp_links(layer, settings)
