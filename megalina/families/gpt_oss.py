"""gpt-oss (arXiv:2508.10925; GptOssForCausalLM of transformers): biases everywhere, attention sinks, windows in every other
layer, YaRN; experts' matrices the other way round, gate and up in turn.  The published files, MXFP4, must be dequantized."""

from collections.abc import Iterator
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import attention_links, decoder_config, decoder_links, decoder_model, layer_prefix
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link, View, same
from megalina.families.windows import FULL, SLIDING, layer_windows, window_fields

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}  # of a config.json that has none


class GptOss(Family):
    name = "gpt_oss"
    model_types = ("gpt_oss",)
    architecture = "GptOssForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        fields.needs("attention_bias", True, why="queries, keys, values and what comes of them have biases")
        fields.needs("swiglu_alpha", 1.702, why="the gate's sigmoid is of 1.702 times it")
        fields.passes("experts_per_token", "initial_context_length")
        fields.defaults("rope_parameters", YARN, unless="rope_scaling")
        kinds = [FULL if layer % 2 else SLIDING for layer in range(fields.whole("num_hidden_layers"))]
        own: dict[str, Any] = {
            "head_dim": fields.whole("head_dim", 64),
            "num_kv_heads": fields.whole("num_key_value_heads", 8),
            "attention_sinks": True,
            "bias": True,
            "activation": "swiglu_clamped",
            "activation_limit": fields.number("swiglu_limit", 7.0),
            "num_experts": fields.whole("num_local_experts", 128, also="num_experts"),
            "d_ff": fields.whole("intermediate_size"),
            **layer_windows(fields, fields.whole("sliding_window", 128, least=1), kinds),
        }
        router = RouterConfig(
            top_k=fields.whole("num_experts_per_tok", 4),
            bias=True,
            balance_loss=fields.number("router_aux_loss_coef", 0.001),
        )
        return Settings(decoder_model(fields, eps=1e-5, theta=1.5e5, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        model = settings.model
        return decoder_config(settings) | {
            "attention_bias": True,
            "swiglu_limit": model.activation_limit,
            "intermediate_size": model.d_ff,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": settings.router.top_k,
            "router_aux_loss_coef": settings.router.balance_loss,
            **window_fields(settings),
        }

    def links(self, settings: Settings) -> Iterator[Link]:
        return decoder_links(settings, attention_links, experts_links)


def experts_links(layer: int, settings: Settings) -> Iterator[Link]:
    """The router and the experts, all in one tensor on both sides."""
    model = settings.model
    experts, width, d_ff = model.num_experts, model.d_model, model.d_ff
    theirs, ours = layer_prefix(layer)
    theirs += "mlp."
    yield same(f"{theirs}router.weight", f"{ours}router.weight", experts, width)
    yield same(f"{theirs}router.bias", f"{ours}router.bias", experts)
    yield Link(
        View(f"{theirs}experts.gate_up_proj", (experts, width, 2 * d_ff), (experts, width, d_ff, 2), order=(0, 3, 2, 1)),
        View(f"{ours}experts.w1", (experts, 2 * d_ff, width), (experts, 2, d_ff, width)),
    )
    yield Link(
        View(f"{theirs}experts.gate_up_proj_bias", (experts, 2 * d_ff), (experts, d_ff, 2), order=(0, 2, 1)),
        View(f"{ours}experts.b1", (experts, 2 * d_ff), (experts, 2, d_ff)),
    )
    yield Link(
        View(f"{theirs}experts.down_proj", (experts, d_ff, width), order=(0, 2, 1)),
        View(f"{ours}experts.w2", (experts, width, d_ff)),
    )
    yield same(f"{theirs}experts.down_proj_bias", f"{ours}experts.b2", experts, width)
