"""Qwen2-MoE (arXiv:2407.10671; Qwen2MoeForCausalLM of transformers): as Qwen3-MoE, with biases of queries, keys and values, and a
shared expert behind a gate of its own."""

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
    mlp_links,
    norm_links,
    refuse_layer_types,
    sparse_fields,
    sparse_layers,
    window,
)
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link, same


class Qwen2Moe(Family):
    name = "qwen2_moe"
    model_types = ("qwen2_moe",)
    architecture = "Qwen2MoeForCausalLM"

    def settings(self, fields: Fields) -> Settings:
        refuse_layer_types(fields)
        experts = fields.whole("num_experts", 60, also="num_local_experts")
        own: dict[str, Any] = {
            "num_kv_heads": fields.whole("num_key_value_heads", 16),
            "attention_bias": "qkv" if fields.flag("qkv_bias", True) else "none",
            "window": window(fields, switch="use_sliding_window"),
            "num_experts": max(experts, 1),
            "d_ff": fields.whole("moe_intermediate_size", 1408),
            "dense_d_ff": fields.whole("intermediate_size"),
            "shared_d_ff": fields.whole("shared_expert_intermediate_size", 5632),
            "shared_gate": True,
            **sparse_layers(fields, experts),
        }
        router = RouterConfig(
            top_k=fields.whole("num_experts_per_tok", 4),
            renormalize=fields.flag("norm_topk_prob", False),
            balance_loss=fields.number("router_aux_loss_coef", 0.001),
        )
        return Settings(decoder_model(fields, eps=1e-6, theta=1e4, **own), router)

    def config(self, settings: Settings) -> dict[str, Any]:
        return decoder_config(settings) | {
            "qkv_bias": settings.model.attention_bias == "qkv",
            "use_sliding_window": False,
            "intermediate_size": settings.dense_d_ff,
            "moe_intermediate_size": settings.model.d_ff,
            "shared_expert_intermediate_size": settings.model.shared_d_ff,
            "num_experts": settings.model.num_experts,
            "num_experts_per_tok": settings.router.top_k,
            "norm_topk_prob": settings.router.renormalize,
            "router_aux_loss_coef": settings.router.balance_loss,
            **sparse_fields(settings),
        }

    def links(self, settings: Settings) -> Iterator[Link]:
        model = settings.model
        yield from end_links(settings)
        for layer, moe in enumerate(settings.moe):
            theirs, ours = layer_prefix(layer)
            theirs += "mlp."
            yield from norm_links(layer, settings)
            yield from attention_links(layer, settings)
            if not moe:
                yield from mlp_links(theirs, f"{ours}mlp", model.d_model, settings.dense_d_ff)
                continue
            yield same(f"{theirs}gate.weight", f"{ours}router.weight", model.num_experts, model.d_model)
            yield from experts_links(f"{theirs}experts.", f"{ours}experts", model.num_experts, model.d_model, model.d_ff)
            yield from mlp_links(f"{theirs}shared_expert.", f"{ours}shared", model.d_model, model.shared_d_ff)
            yield same(f"{theirs}shared_expert_gate.weight", f"{ours}shared.gate", 1, model.d_model)
