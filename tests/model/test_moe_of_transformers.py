"""Experts, routers and multi-token prediction of each family as transformers computes them, with the same weights, in float32:
results, choices of experts, and the gradient of every weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalina.config import ModelConfig, RouterConfig
from megalina.model.block_functions import Seen
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.model.mtp import ahead
from tests.model.test_gpt import LENGTH, SEQUENCES, WORDS, batch_of

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers isn't installed"),
]
WIDTH, HIDDEN, SHARED, EXPERTS = 32, 24, 40, 8
MOST = 2e-6  # of the largest number
MOST_OF_GRADIENTS = 1e-5


@dataclass(frozen=True)
class Family:
    module: str
    names: tuple[str, str]  # of its configuration and of its mixture of experts
    theirs: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)


SHARED_SIZE = "shared_expert_intermediate_size"
DEEPSEEK = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": HIDDEN, "num_experts_per_tok": 3}
FAMILIES = {
    "gpt-oss": Family(
        "gpt_oss", ("GptOssConfig", "GptOssMLP"), {"num_local_experts": EXPERTS, "intermediate_size": HIDDEN},
        {"activation": "swiglu_clamped", "bias": True}, {"top_k": 4, "bias": True},
    ),
    "Qwen2-MoE": Family(
        "qwen2_moe", ("Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock"),
        {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": HIDDEN} | {SHARED_SIZE: SHARED},
        {"shared_d_ff": SHARED, "shared_gate": True}, {"top_k": 3, "renormalize": False},
    ),
    "DeepSeek-V2": Family(
        "deepseek_v2", ("DeepseekV2Config", "DeepseekV2Moe"),
        DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        {"shared_d_ff": HIDDEN},
        {"kind": "group_limited_softmax", "num_groups": 4, "groups_per_token": 2, "top_k": 3, "renormalize": False,
         "scale": 16.0},
    ),
    "DeepSeek-V3": Family(
        "deepseek_v3", ("DeepseekV3Config", "DeepseekV3MoE"),
        DEEPSEEK | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        {"shared_d_ff": HIDDEN},
        {"kind": "group_limited", "num_groups": 4, "groups_per_token": 2, "top_k": 3, "scale": 2.5, "bias_update_rate": 0.001},
    ),
    "GLM-4.5": Family(
        "glm4_moe", ("Glm4MoeConfig", "Glm4MoeMoE"), DEEPSEEK | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        {"shared_d_ff": HIDDEN}, {"kind": "sigmoid", "top_k": 3, "bias_update_rate": 0.001},
    ),
}  # fmt: skip
SHARED_NAMES = ("shared_expert", "shared_experts")


def gpt_of(model: Mapping[str, Any], router: Mapping[str, Any]) -> GPT:
    config = ModelConfig(num_layers=1, d_model=WIDTH, d_ff=HIDDEN, num_experts=EXPERTS, init_std=0.3, norm_eps=1e-6, **model)
    gpt = GPT(config, RouterConfig(**router), vocab_size=WORDS, max_positions=LENGTH, seed=1)
    initialize(gpt, seed=1, dtype=torch.float32)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=random))
        for state in gpt.router_state().values():
            state.copy_(0.1 * torch.randn(state.shape, generator=random))
    return gpt


def their_name(theirs: nn.Module, name: str) -> tuple[str, ...]:
    """Of ours, in a mixture of experts: several where they have gate and up apart."""
    shared = next((found for found in SHARED_NAMES if hasattr(theirs, found)), "")
    router = "router" if hasattr(theirs, "router") else "gate"
    return {
        "router.weight": (f"{router}.weight",),
        "router.bias": (f"{router}.bias",),
        "experts.w1": ("experts.gate_up_proj",),
        "experts.w2": ("experts.down_proj",),
        "experts.b1": ("experts.gate_up_proj_bias",),
        "experts.b2": ("experts.down_proj_bias",),
        "shared.w1": (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
        "shared.w2": (f"{shared}.down_proj.weight",),
        "shared.gate": ("shared_expert_gate.weight",),
    }[name]


def in_their_order(family: str, name: str, value: Tensor) -> Tensor:
    """gpt-oss has gate and up in turn, and matrices the other way round."""
    if family != "gpt-oss" or not name.startswith("experts."):
        return value
    if name in ("experts.w1", "experts.b1"):
        value = torch.stack(value.chunk(2, dim=1), dim=2).flatten(1, 2)
    return value.transpose(1, 2) if value.dim() == 3 else value


def apart(values: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    return list(values.chunk(len(names), dim=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_is_the_familys(family: str) -> None:
    made = FAMILIES[family]
    module = import_module(f"transformers.models.{made.module}.modeling_{made.module}")
    config = getattr(module, made.names[0])(hidden_size=WIDTH, experts_implementation="eager", **made.theirs)
    theirs: nn.Module = getattr(module, made.names[1])(config)
    gpt = gpt_of(made.model, made.router)
    layer, there = gpt.layers[0], dict(theirs.named_parameters())
    ours = {n: p for n, p in layer.named_parameters() if n.startswith(("router.", "experts.", "shared."))}
    with torch.no_grad():
        for name, p in ours.items():
            names = their_name(theirs, name)
            for target, value in zip(names, apart(in_their_order(family, name, p), names), strict=True):
                there[target].copy_(value)
        if layer.router.bias_E is not None:
            theirs.gate.e_score_correction_bias.copy_(layer.router.bias_E)  # type: ignore[union-attr, operator]
    assert {n for name in ours for n in their_name(theirs, name)} == there.keys()
    batch = batch_of()
    h_TD = torch.randn(SEQUENCES * LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    seen = Seen()
    got_TD = layer.functions["moe"].forward(h_TD, batch, seen) - h_TD
    want = theirs(layer.mlp_norm(h_TD)[None])
    want_TD = (want[0] if isinstance(want, tuple) else want)[0]
    near(got_TD, want_TD, MOST)
    dy_TD = torch.randn(got_TD.shape, generator=torch.Generator().manual_seed(4))
    got = dict(zip(ours, torch.autograd.grad(got_TD, list(ours.values()), dy_TD), strict=True))
    wanted = dict(zip(there, torch.autograd.grad(want_TD, list(there.values()), dy_TD), strict=True))
    for name, gradient in got.items():
        names = their_name(theirs, name)
        for target, value in zip(names, apart(in_their_order(family, name, gradient), names), strict=True):
            near(value, wanted[target], MOST_OF_GRADIENTS, f"{name}, {target}")


def test_multi_token_prediction_is_transformers() -> None:
    """With Mixtral's layers; every layer gets the stream behind the norm of the one before."""
    from transformers import MixtralConfig
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_layers import MtpLayer
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralRMSNorm, MixtralRotaryEmbedding

    gpt, batch = gpt_of({"mtp_layers": 2, "num_heads": 4, "num_kv_heads": 2}, {"top_k": 2}), batch_of()
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, num_local_experts=EXPERTS,
        num_experts_per_tok=2, rms_norm_eps=1e-6, rope_theta=10000.0, num_hidden_layers=2, attn_implementation="eager",
        experts_implementation="eager", max_position_embeddings=LENGTH,
    )  # fmt: skip
    n_TD, _ = gpt.hidden(batch)
    x_TD, hidden_BSD = gpt._stream(batch, Seen()), n_TD.view(SEQUENCES, LENGTH, WIDTH)
    positions = MixtralRotaryEmbedding(config)(hidden_BSD, position_ids=batch.position_BS)
    mask = create_causal_mask(config, hidden_BSD, None, None, position_ids=batch.position_BS)
    for depth, layer in enumerate(gpt.mtp_layers, 1):
        theirs = MtpLayer(config, MixtralDecoderLayer, MixtralRMSNorm, depth - 1)
        there = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, target in MTP_NAMES.items():
                there.pop(target).copy_(dict(layer.named_parameters())[name])
        assert not there
        embedded_BSD = gpt.embedding[ahead(batch, depth).tokens_BS]
        with torch.no_grad():
            hidden_BSD = theirs(embedded_BSD, hidden_BSD, positions, mask, batch.position_BS, None)
            x_TD = layer.through(x_TD, batch, Seen())
            near(layer.mtp.norm(x_TD), hidden_BSD.flatten(0, 1), MOST, f"depth {depth}")


MTP_NAMES = {
    "mtp.embedding_norm.weight": "enorm.weight",
    "mtp.hidden_norm.weight": "hnorm.weight",
    "mtp.projection": "eh_proj.weight",
    "mtp.norm.weight": "post_norm.weight",
    "attention_norm.weight": "mtp_block.input_layernorm.weight",
    "attention.q": "mtp_block.self_attn.q_proj.weight",
    "attention.k": "mtp_block.self_attn.k_proj.weight",
    "attention.v": "mtp_block.self_attn.v_proj.weight",
    "attention.proj": "mtp_block.self_attn.o_proj.weight",
    "mlp_norm.weight": "mtp_block.post_attention_layernorm.weight",
    "router.weight": "mtp_block.mlp.gate.weight",
    "experts.w1": "mtp_block.mlp.experts.gate_up_proj",
    "experts.w2": "mtp_block.mlp.experts.down_proj",
}


def near(got: Tensor, want: Tensor, most: float, what: str = "") -> None:
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= most, f"{what}: {error}"
