"""GLM-4.5 (arXiv:2508.06471; Glm4MoeForCausalLM of transformers): grouped queries of which half the numbers turn, sigmoid scores
with a selection bias, shared experts, multi-token prediction."""

from collections.abc import Iterator
from typing import Any

from megalina.families.decoder import attention_links, decoder_config, decoder_links, decoder_model, feed_links
from megalina.families.family import Settings
from megalina.families.fields import Fields
from megalina.families.links import Link
from megalina.families.shared_experts import (
    MtpFamily,
    bias_links,
    expert_fields,
    expert_settings,
    mtp_layers,
    mtp_links,
    shared_links,
    sigmoid_fields,
    sigmoid_router,
)


class Glm4Moe(MtpFamily):
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
        router = sigmoid_router(fields, top_k=8, scale=1.0, groups=1, groups_per_token=1, renormalize=True)
        return Settings(decoder_model(fields, eps=1e-5, theta=1e4, rotary_fraction=0.5, **own), router)

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
        return decoder_links(settings, attention_links, feed_links, shared_links, bias_links, mtp_links)
