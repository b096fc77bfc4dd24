"""Attention of each family as transformers computes it, with the same weights: what a layer gives, in float32."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.config import ModelConfig
from tests.serve.small_engine import batch_of, small_gpt, tokens_of

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers isn't installed"),
]
LENGTH, WIDTH, HEADS = 40, 32, 4
NAMES = {"q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight", "proj": "o_proj.weight"}
BIASES = {"q_bias": "q_proj.bias", "k_bias": "k_proj.bias", "v_bias": "v_proj.bias", "proj_bias": "o_proj.bias"}
NORMS = {"q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight"}
LATENT = {
    **{"q": "q_proj.weight", "q_down": "q_a_proj.weight", "q_up": "q_b_proj.weight", "q_norm.weight": "q_a_layernorm.weight"},
    **{"kv_down": "kv_a_proj_with_mqa.weight", "kv_norm.weight": "kv_a_layernorm.weight", "kv_up": "kv_b_proj.weight"},
    "proj": "o_proj.weight",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}
OUR_YARN = {
    **{"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 16},
    **{"rope_beta_fast": 4.0, "rope_beta_slow": 0.5},
}
MLA = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10}


@dataclass(frozen=True)
class Family:
    module: str
    prefix: str  # of its classes
    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)


FAMILIES = {
    "OLMoE": Family(
        "olmoe", "Olmoe", {"num_key_value_heads": 2}, {"qk_norm": "projection", "num_kv_heads": 2}, {**NAMES, **NORMS}
    ),
    "Qwen2-MoE": Family("qwen2_moe", "Qwen2Moe", {"num_key_value_heads": 2}, {"attention_bias": "qkv", "num_kv_heads": 2},
        NAMES | {k: v for k, v in BIASES.items() if k != "proj_bias"}),
    "Qwen3-MoE": Family("qwen3_moe", "Qwen3Moe", {"num_key_value_heads": 2, "head_dim": 12}, {"qk_norm": "head", "head_dim": 12,
        "norm_eps": 1e-6, "num_kv_heads": 2}, {**NAMES, **NORMS}),
    "GLM-4.5": Family(
        "glm4_moe", "Glm4Moe",
        {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "use_qk_norm": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"num_kv_heads": 2, "head_dim": 16, "attention_bias": "qkv", "qk_norm": "head", "rotary_fraction": 0.5},
        {**NAMES, **NORMS, **{k: v for k, v in BIASES.items() if k != "proj_bias"}},
    ),
    "gpt-oss": Family(
        "gpt_oss", "GptOss",
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6,
         "rope_parameters": {**YARN, "rope_theta": 150000.0, "truncate": False}},
        {"num_kv_heads": 2, "head_dim": 8, "window": 6, "full_attention_every": 2, "attention_bias": "all",
         "attention_sinks": True, **OUR_YARN, "rope_theta": 150000.0, "rope_truncate": False},
        {**NAMES, **BIASES, "sinks": "sinks"},
    ),
    "Mixtral": Family("mixtral", "Mixtral", {"num_key_value_heads": 2, "sliding_window": 5, "rope_parameters":
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"num_kv_heads": 2, "window": 5, "rope_scaling": "linear", "rope_factor": 2.0}),
    "DeepSeek-V2": Family(
        "deepseek_v2", "DeepseekV2",
        {"num_key_value_heads": 4, "q_lora_rank": None, **MLA,
         "rope_parameters": {**YARN, "rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 0.7}},
        {"attention": "mla", "num_kv_heads": 4, **MLA, **OUR_YARN, "rope_mscale": 0.7, "rope_mscale_all_dim": 0.7}, LATENT,
    ),
    "DeepSeek-V3, Kimi-K2": Family(
        "deepseek_v3", "DeepseekV3",
        {"num_key_value_heads": 4, "q_lora_rank": 20, **MLA, "rms_norm_eps": 1e-5,
         "rope_parameters": {**YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"attention": "mla", "num_kv_heads": 4, "q_lora_rank": 20, **MLA, **OUR_YARN, "norm_eps": 1e-5, "rope_mscale": 1.0,
         "rope_mscale_all_dim": 0.5}, LATENT,
    ),
    "Moonlight": Family(
        "deepseek_v3", "DeepseekV3",
        {"num_key_value_heads": 4, "q_lora_rank": None, **MLA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"attention": "mla", "num_kv_heads": 4, **MLA, "rope_theta": 5e4}, LATENT,
    ),
}  # fmt: skip


def halves_first(rows: Tensor) -> Tensor:
    """Rows of pairs of neighbours in the order of pairs of halves."""
    return torch.cat([rows[0::2], rows[1::2]])


def as_ours(name: str, weight: Tensor, model: ModelConfig) -> Tensor:
    """A weight of theirs: DeepSeek's turned rows are pairs of neighbours."""
    if model.attention != "mla" or name not in ("q", "q_up", "kv_down"):
        return weight
    if name == "kv_down":
        return torch.cat([weight[: model.kv_lora_rank], halves_first(weight[model.kv_lora_rank :])])
    heads = weight.view(model.num_heads, -1, weight.shape[1])
    still = model.qk_nope_head_dim
    return torch.cat([torch.cat([head[:still], halves_first(head[still:])]) for head in heads])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_s_attention_is_theirs(name: str) -> None:
    family = FAMILIES[name]
    package = f"transformers.models.{family.module}"
    configuration = import_module(f"{package}.configuration_{family.module}")
    modeling = import_module(f"{package}.modeling_{family.module}")
    common = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = getattr(configuration, f"{family.prefix}Config")(**{"vocab_size": 97, **common, **family.theirs})
    config._attn_implementation = "eager"
    gpt = small_gpt(dtype=torch.float32, **{"num_layers": 2, "d_model": WIDTH, "num_heads": HEADS, **family.ours})
    batch = batch_of(tokens_of(0, sequences=2, length=LENGTH))
    rotary = getattr(modeling, f"{family.prefix}RotaryEmbedding")(config)
    torch.manual_seed(0)
    x_BSD = torch.randn(2, LENGTH, WIDTH)
    for i, layer in enumerate(gpt.layers):
        theirs = getattr(modeling, f"{family.prefix}Attention")(config, i)
        values = {key: torch.randn_like(p) * 0.3 + (1.0 if "norm" in key else 0.0) for key, p in theirs.named_parameters()}
        theirs.load_state_dict(values, strict=False)
        held = dict(layer.attention.named_parameters())
        assert {family.names[key] for key in held} == set(values), set(values) ^ {family.names[key] for key in held}
        with torch.no_grad():
            for key, p in held.items():
                p.copy_(as_ours(key, values[family.names[key]], gpt.config))
            theirs.eval()
            given = theirs(
                hidden_states=x_BSD,
                position_embeddings=rotary(x_BSD, batch.position_BS),
                attention_mask=_mask(gpt.config, i),
            )[0]
            ours = layer.attention(x_BSD.flatten(0, 1), batch)
            if layer.attention.proj_bias is not None:
                ours = ours + layer.attention.proj_bias
        error = (ours.view_as(given) - given).abs().max() / given.abs().max()
        assert error < 1e-6, (i, error)
        assert given.abs().max() > 0.3, "nothing to compare"


def _mask(model: ModelConfig, layer: int) -> Tensor:
    """Added to scores: as transformers makes it of a layer's window."""
    place = torch.arange(LENGTH)
    hidden = place[None] > place[:, None]
    every = model.full_attention_every
    if model.window and not (every and layer % every == every - 1):
        hidden |= place[None] <= place[:, None] - model.window
    return torch.zeros(LENGTH, LENGTH).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
