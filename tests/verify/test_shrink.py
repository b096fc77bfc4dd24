"""The shrunk configuration: small, with every mechanism of the large one, and good for every layout."""

from dataclasses import replace

import pytest

from megalina.compose import compose
from megalina.config import ModelConfig, OptimConfig, PretrainConfig, RouterConfig, is_moe_layer
from megalina.validate import check_config
from megalina.verify.layouts import places
from megalina.verify.recording import SEQUENCES
from megalina.verify.shrink import shrink, shrink_router
from tests.test_conf import MODELS, ROOT

ROUTERS = sorted(path.stem for path in (ROOT / "conf" / "router").glob("*.yaml"))


def has_moe(model: ModelConfig) -> set[bool]:
    return {is_moe_layer(model, i) for i in range(model.num_layers)}


def mechanisms(config: PretrainConfig) -> dict[str, object]:
    """What is computed, whatever its size."""
    model, router, optim = config.model, config.router, config.optim
    switched = ("activation", "norm", "positions", "qk_norm", "bias", "tie_embeddings", "dropout", "rope_theta", "norm_eps")
    switched += ("attention", "attention_bias", "attention_sinks", "rope_scaling", "rope_factor", "rope_original_positions")
    switched += ("activation_limit", "shared_gate", "mtp_layers", "mtp_loss")
    return {
        **{name: getattr(model, name) for name in switched},
        "layers": has_moe(model),
        "shared experts": model.shared_d_ff > 0,
        "dense width of its own": model.dense_d_ff > 0,
        "grouped queries": model.num_heads > model.num_kv_heads,
        "compressed queries": model.q_lora_rank > 0,
        "windows": (model.window > 0, model.full_attention_every > 0),
        "a part of a head turns": model.rotary_fraction < 1,
        "head size of its own": model.head_dim not in (0, model.d_model // model.num_heads),
        "one expert a token": router.top_k == 1,
        "router": replace(router, top_k=1, num_groups=1, groups_per_token=1),
        "optimizer": (optim.name, optim.lr, optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm > 0),
        "data": config.data,
    }


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_keeps_its_mechanisms_and_fits_every_layout(name: str) -> None:
    config = compose([f"model={name}"])
    for ranks in (1, 2, 3, 4, 8):
        small = shrink(config, ranks)
        assert mechanisms(small) == mechanisms(config)
        assert small.model.d_model * small.model.num_layers <= 320
        assert (small.train.dtype, small.train.global_batch_size) == ("float64", SEQUENCES)
        for world, tp, ep, sequence in places(ranks):
            parallel = replace(small.parallel, tp=tp, ep=ep, sequence=sequence)
            train = replace(small.train, micro_batch_size=1)
            check_config(replace(small, parallel=parallel, train=train), world)


def test_patterns_of_layers_keep_both_kinds() -> None:
    for settings in (
        {"num_layers": 12, "dense_layers_first": 3, "moe_every": 4},
        {"num_layers": 12, "dense_layers_first": 3},
        {"num_layers": 24, "moe_every": 2},
        {"num_layers": 5},
        {"num_layers": 1},
        {"num_layers": 6, "dense_layers_first": 6},
    ):
        model = ModelConfig(**settings)
        small = shrink(PretrainConfig(model=model), 4).model
        assert has_moe(small) == has_moe(model), settings
        assert small.num_layers <= min(5, model.num_layers)


def test_what_is_off_stays_off() -> None:
    config = PretrainConfig(
        router=RouterConfig(balance_loss=0.0, z_loss=0.0, capacity_factor=0.0), optim=OptimConfig(clip_norm=0.0, weight_decay=0.0)
    )
    small = shrink(config, 4)
    assert (small.router.balance_loss, small.router.z_loss, small.router.capacity_factor) == (0.0, 0.0, 0.0)
    assert (small.optim.clip_norm, small.optim.weight_decay) == (0.0, 0.0)


@pytest.mark.sampled(13)
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("model", ["olmoe_1b_7b", "tiny", "lina_12l_4e"])
def test_every_router_fits_the_shrunk_experts(name: str, model: str) -> None:
    config = compose([f"model={model}", f"router={name}"])
    for ranks in (1, 4, 8):
        check_config(shrink(config, ranks), 1)


def test_groups_of_experts_stay_groups() -> None:
    router = RouterConfig(kind="group_limited", num_groups=8, groups_per_token=4, top_k=8)
    small = shrink_router(router, 256, 8)
    assert (small.num_groups, small.groups_per_token, small.top_k) == (4, 3, 4)
    assert shrink_router(replace(router, groups_per_token=8), 256, 8).groups_per_token == 4  # all groups are still all
    assert shrink_router(RouterConfig(top_k=64), 64, 8).top_k == 8  # every expert is still every expert
    assert shrink_router(RouterConfig(top_k=8), 64, 8).top_k == 4
