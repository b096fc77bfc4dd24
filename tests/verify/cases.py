"""What the tests of `megalina.verify` run: the models and routers of the star test, shrunk."""

from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megalina.config import ModelConfig, OptimConfig, PretrainConfig, RouterConfig, StrategyConfig, TrainConfig
from megalina.step.strategy import STRATEGIES
from megalina.verify.layouts import Choices
from megalina.verify.shrink import shrink, shrink_router

CONF = Path(__file__).parents[2] / "conf" / "strategy"
SIZES: dict[str, Any] = {"num_experts": 4, "num_heads": 4, "num_kv_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense first, shared experts": {"num_layers": 3, "dense_layers_first": 1, "shared_d_ff": 12},
    "GPT-2": {
        "tie_embeddings": False, "positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu",
        "dense_d_ff": 24, "moe_every": 2,
    },
    "modern": {
        "attention_experts": 4, "qk_norm": "head", "num_heads": 8, "num_kv_heads": 4, "head_dim": 24, "tie_embeddings": False,
    },
    "DeepSeek-V3, windows and sinks": {
        "attention": "mla", "q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "attention_sinks": True, "window": 3, "full_attention_every": 2,
    },
    "Moonlight": {
        "attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 32, "rope_mscale": 1.0, "rope_mscale_all_dim": 0.7,
        "norm_eps": 1e-5, "tie_embeddings": False,
    },
    "gpt-oss, part of a head turns": {
        "attention_sinks": True, "window": 3, "full_attention_every": 2, "attention_bias": "all", "rotary_fraction": 0.5,
        "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 32, "rope_beta_fast": 4.0,
    },
    "OLMoE, biases": {"qk_norm": "projection", "attention_bias": "qkv", "num_heads": 8, "num_kv_heads": 4},
    "dropout": {
        "dropout": 0.2, "bias": True, "activation": "relu", "num_layers": 3, "dense_layers_first": 1, "shared_d_ff": 12,
    },
    "ahead": {
        "num_layers": 1, "mtp_layers": 2, "activation": "swiglu_clamped", "activation_limit": 0.5, "bias": True,
        "shared_d_ff": 12, "shared_gate": True,
    },
}  # fmt: skip
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "groups of best": {
        "kind": "group_limited_softmax", "num_groups": 2, "groups_per_token": 1, "renormalize": False, "group": "micro_batch",
    },
    "global": {"group": "global"},
    "capacity": {"capacity_factor": 0.8, "bias": True},
    "sigmoid": {"kind": "sigmoid", "bias_update_rate": 0.01, "bias_centered": True},
    "group limited": {
        "kind": "group_limited", "num_groups": 2, "groups_per_token": 1, "bias_update_rate": 0.5, "bias_update": "proportional",
        "capacity_factor": 1.0,
    },
    "expert choice": {"kind": "expert_choice"},
    "noisy": {"kind": "noisy_topk", "noise_std": 0.5},
    "hash": {"kind": "hash"},
    # a Switch gate, but for its scores: one expert per token, whose probability is the weight
    "locmoe": {
        "kind": "locmoe", "top_k": 1, "renormalize": False, "capacity_factor": 1.0, "group": "micro_batch",
        "temperature": 0.1, "locality_loss": 0.1, "locality_nodes": 2,
    },
    "locmoe plus": {  # with learned rows: those that are fixed have the same cosines, and no gradients
        "kind": "locmoe_plus_learned", "temperature": 0.1, "capacity_factor": 0.8, "drop": "probability", "group": "micro_batch",
        "mutual_information_loss": 0.1, "capacity_bound": "locmoe",
        "capacity_delta": "quantile", "capacity_quantile": 0.9, "capacity_ema": 0.5,
    },
    "replayed": {
        "kind": "sigmoid", "bias_update_rate": 0.01, "renormalize": False, "group": "micro_batch", "replay": "drawn",
    },
    "dense": {"kind": "dense", "renormalize": False, "balance_loss": 0.0, "mutual_information_loss": 0.1},
}  # fmt: skip
OPTIMIZERS = {"sgd": OptimConfig(name="sgd", lr=0.1), "adamw": OptimConfig(name="adamw", lr=1e-3)}


def config_with(*, ranks: int = 4, model: str = "plain", router: str = "topk", optimizer: str = "adamw") -> PretrainConfig:
    """A shrunk configuration for layouts of up to `ranks` ranks."""
    config = PretrainConfig(
        model=ModelConfig(**(SIZES | MODELS[model])),
        router=RouterConfig(**({"top_k": 2, "balance_loss": 0.1, "z_loss": 0.01} | ROUTERS[router])),
        optim=OPTIMIZERS[optimizer],
        train=TrainConfig(seed=7),
    )
    return shrink(config, ranks)


def choices_of(ranks: int) -> Choices:
    """Every model with every router, both optimizers, every strategy whose lists are its own."""
    base = config_with(ranks=ranks)
    return Choices(
        base,
        routers={name: shrink_router(config_with(router=name).router, 4, base.model.num_experts) for name in ROUTERS},
        strategies={name: strategy(name) for name in distinct()},
        models={name: config_with(ranks=ranks, model=name).model for name in MODELS},
        optimizers={name: config_with(optimizer=name).optim for name in OPTIMIZERS},
    )


def distinct() -> list[str]:
    """Of strategies that are the same function with the same settings, the first: a row says how large pieces are, and packing is
    another layout."""
    found: dict[tuple[Any, ...], str] = {}
    for name, function in STRATEGIES.items():
        settings = replace(strategy(name), name="", partition_bytes="0", packing="1")
        found.setdefault((function, *astuple(settings)), name)
    return list(found.values())


@cache
def strategy(name: str) -> StrategyConfig:
    """As `conf/strategy/` has it."""
    fields = StrategyConfig()
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return StrategyConfig(**{key: type(getattr(fields, key))(value) for key, value in values.items()})


def with_router(config: PretrainConfig, **settings: Any) -> PretrainConfig:
    return replace(config, router=replace(config.router, **settings))
