"""A decoder whose first layers are dense and whose others have shared experts: what the DeepSeek models and GLM-4.5 have in
common, layers of multi-token prediction (arXiv:2412.19437, section 2.2) among it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from megalina.config import RouterConfig
from megalina.families.decoder import layer_prefix, mlp_links
from megalina.families.family import Family, Settings
from megalina.families.fields import Fields
from megalina.families.links import Link, View, same


def expert_settings(fields: Fields, *, experts: int | None, shared: int | None, dense: int, d_ff: int) -> dict[str, int]:
    """The numbers: where config.json has none; None: it must have one."""
    fields.needs("moe_layer_freq", 1, why="every layer above the dense ones is a mixture of experts")
    fields.passes("aux_loss_alpha", "seq_aux", "ep_size", "num_local_experts")
    d_ff = fields.whole("moe_intermediate_size", d_ff)
    return {
        "num_experts": fields.whole("n_routed_experts", experts, also="num_experts"),
        "d_ff": d_ff,
        "shared_d_ff": fields.whole("n_shared_experts", shared) * d_ff,
        "dense_layers_first": min(fields.whole("first_k_dense_replace", dense), fields.whole("num_hidden_layers")),
        "dense_d_ff": fields.whole("intermediate_size"),
    }


def expert_fields(settings: Settings) -> dict[str, Any]:
    """What `expert_settings` reads."""
    model = settings.model
    return {
        "n_routed_experts": model.num_experts,
        "moe_intermediate_size": model.d_ff,
        "n_shared_experts": model.shared_d_ff // model.d_ff,
        "first_k_dense_replace": model.dense_layers_first,
        "intermediate_size": settings.dense_d_ff,
        "num_experts_per_tok": settings.router.top_k,
        "routed_scaling_factor": settings.router.scale,
        "norm_topk_prob": settings.router.renormalize,
    }


def sigmoid_router(
    fields: Fields, *, top_k: int | None, scale: float, groups: int, groups_per_token: int, renormalize: bool
) -> RouterConfig:
    """Sigmoid scores with a selection bias, within groups where there are several (DeepSeek-V3).  The values: where config.json
    has none; None: it must have one."""
    fields.needs("scoring_func", "sigmoid", why="the router's scores are sigmoids")
    fields.needs("topk_method", "noaux_tc", why="experts are chosen by score and bias")
    groups = fields.whole("n_group", groups)
    limited: dict[str, Any] = {"num_groups": groups, "groups_per_token": fields.whole("topk_group", groups_per_token)}
    return RouterConfig(
        kind="group_limited" if groups > 1 else "sigmoid",
        top_k=fields.whole("num_experts_per_tok", top_k),
        renormalize=fields.flag("norm_topk_prob", renormalize),
        scale=fields.number("routed_scaling_factor", scale),
        balance_loss=0.0,
        bias_update_rate=0.001,
        **(limited if groups > 1 else {}),
    )


def sigmoid_fields(settings: Settings) -> dict[str, Any]:
    """What `sigmoid_router` reads besides."""
    router = settings.router
    return {"n_group": router.num_groups, "topk_group": router.groups_per_token}


class MtpFamily(Family):
    """One whose files may have layers of multi-token prediction."""

    def present(self, settings: Settings, keys: Collection[str]) -> Settings:
        """Without these layers where the files have none: transformers leaves them out when it writes."""
        at, _ = layer_prefix(settings.model.num_layers)
        there = any(key.startswith(at) for key in keys)
        return settings if there else replace(settings, model=replace(settings.model, mtp_layers=0))

    def copies(self, settings: Settings) -> Mapping[str, str]:
        """Each of these layers has the embedding and the output matrix once more."""
        model = settings.model
        output = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
        out = {**super().copies(settings)}
        for layer in range(model.num_layers, model.num_layers + model.mtp_layers):
            at, _ = layer_prefix(layer)
            out |= {f"{at}embed_tokens.weight": "model.embed_tokens.weight", f"{at}shared_head.head.weight": output}
        return out


def mtp_layers(fields: Fields) -> int:
    return fields.whole("num_nextn_predict_layers", 0, also="num_mtp_layers")


def mtp_links(layer: int, settings: Settings) -> Iterator[Link]:
    """What leads into a layer of multi-token prediction and out of it; nothing of other layers."""
    model = settings.model
    if layer >= model.num_layers:
        theirs, ours = layer_prefix(layer)
        width = model.d_model
        yield same(f"{theirs}enorm.weight", f"{ours}mtp.embedding_norm.weight", width)
        yield same(f"{theirs}hnorm.weight", f"{ours}mtp.hidden_norm.weight", width)
        yield same(f"{theirs}eh_proj.weight", f"{ours}mtp.projection", width, 2 * width)
        yield same(f"{theirs}shared_head.norm.weight", f"{ours}mtp.norm.weight", width)


def shared_links(layer: int, settings: Settings) -> Iterator[Link]:
    """Shared experts, as one MLP."""
    theirs, ours = layer_prefix(layer)
    if settings.is_moe(layer) and settings.model.shared_d_ff:
        yield from mlp_links(f"{theirs}mlp.shared_experts.", f"{ours}shared", settings.model.d_model, settings.model.shared_d_ff)


def bias_links(layer: int, settings: Settings) -> Iterator[Link]:
    """The selection bias of `sigmoid_router`."""
    theirs, ours = layer_prefix(layer)
    if settings.is_moe(layer):
        yield same(f"{theirs}mlp.gate.e_score_correction_bias", f"{ours}router.bias_E", settings.model.num_experts)


def latent_settings(fields: Fields, *, q_lora_rank: int = 1536) -> dict[str, Any]:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1).  `q_lora_rank` null: queries are made of the stream."""
    fields.needs("attention_bias", False, why="latent attention has no biases")
    fields.passes("head_dim", "qk_head_dim", "num_key_value_heads")  # transformers sets them itself, from the others
    return {
        "attention": "mla",
        "num_kv_heads": fields.whole("num_attention_heads"),
        "head_dim": 0,
        "q_lora_rank": fields.whole_or_null("q_lora_rank", q_lora_rank),
        "kv_lora_rank": fields.whole("kv_lora_rank", 512),
        "qk_nope_head_dim": fields.whole("qk_nope_head_dim", 128),
        "qk_rope_head_dim": fields.whole("qk_rope_head_dim", 64),
        "v_head_dim": fields.whole("v_head_dim", 128),
    }


def latent_fields(settings: Settings) -> dict[str, Any]:
    """What `latent_settings` reads."""
    model = settings.model
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {name: getattr(model, name) for name in names} | {
        "attention_bias": False,
        "q_lora_rank": model.q_lora_rank or None,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.qk_rope_head_dim,
    }


def latent_links(layer: int, settings: Settings) -> Iterator[Link]:
    """Latent attention.  Their RoPE turns neighbours (2i, 2i + 1), ours (i, i + half): turned rows are even ones, then odd."""
    theirs, ours = (f"{prefix}{name}" for prefix, name in zip(layer_prefix(layer), ("self_attn.", "attention."), strict=True))
    model, width, heads = settings.model, settings.model.d_model, settings.model.num_heads
    still, turned, rank = model.qk_nope_head_dim, model.qk_rope_head_dim, model.kv_lora_rank
    queries = ("q_b_proj", "q_up") if model.q_lora_rank else ("q_proj", "q")
    if model.q_lora_rank:
        yield same(f"{theirs}q_a_proj.weight", f"{ours}q_down", model.q_lora_rank, width)
        yield same(f"{theirs}q_a_layernorm.weight", f"{ours}q_norm.weight", model.q_lora_rank)
    yield from turned_links(
        f"{theirs}{queries[0]}.weight", f"{ours}{queries[1]}", heads, still, turned, model.q_lora_rank or width
    )
    yield from turned_links(f"{theirs}kv_a_proj_with_mqa.weight", f"{ours}kv_down", 1, rank, turned, width)
    yield same(f"{theirs}kv_a_layernorm.weight", f"{ours}kv_norm.weight", rank)
    yield same(f"{theirs}kv_b_proj.weight", f"{ours}kv_up", heads * (still + model.v_head_dim), rank)
    yield same(f"{theirs}o_proj.weight", f"{ours}proj", width, heads * model.v_head_dim)


def turned_links(theirs: str, ours: str, heads: int, still: int, turned: int, width: int) -> Iterator[Link]:
    """Rows of heads, of which the last `turned` each are turned."""
    shape, split = (heads * (still + turned), width), (heads, still + turned, width)
    every = slice(None)
    for there, here in (
        (slice(0, still), slice(0, still)),
        (slice(still, None, 2), slice(still, still + turned // 2)),
        (slice(still + 1, None, 2), slice(still + turned // 2, None)),
    ):
        yield Link(View(theirs, shape, split=split, at=(every, there)), View(ours, shape, split=split, at=(every, here)))
