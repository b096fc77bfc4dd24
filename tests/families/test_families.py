"""config.json in the spellings of transformers 4 and 5, and what of it can't be taken."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from megalina.config import ModelConfig, RouterConfig
from megalina.explain import CONF
from megalina.families.family import Settings
from megalina.families.table import family_for, family_named, family_of
from tests.checkpoint.hugging_face.plain import CONFIGS, config_of


def read(kind: str, **changes: Any) -> Settings:
    config = {key: value for key, value in config_of(kind, **changes).items() if value != "absent"}
    return family_of(config).read(config)


def test_both_spellings_of_rope_mean_the_same() -> None:
    four = read("mixtral", rope_theta=5e5, rope_scaling=None)
    five = read("mixtral", rope_theta="absent", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert four.math() == five.math() and four.model.rope_theta == 5e5


def test_what_is_absent_has_the_value_of_the_class() -> None:
    """Of MixtralConfig and Qwen3MoeConfig in transformers 5.23."""
    mixtral = read("mixtral", num_key_value_heads=None, num_local_experts="absent", rope_theta="absent", rms_norm_eps="absent")
    assert (mixtral.model.num_kv_heads, mixtral.model.num_experts, mixtral.model.rope_theta) == (8, 8, 1e6)
    assert mixtral.model.norm_eps == 1e-5 and mixtral.router.renormalize and not mixtral.model.tie_embeddings
    qwen = read("qwen3_moe", norm_topk_prob="absent", mlp_only_layers=None, rope_parameters="absent", rms_norm_eps="absent")
    assert not qwen.router.renormalize and qwen.moe == [True, True]
    assert (qwen.model.rope_theta, qwen.model.norm_eps) == (1e4, 1e-6)


@pytest.mark.parametrize(
    ("layers", "step", "dense", "moe"),
    [
        (4, 1, [], [0, 1, 2, 3]),
        (4, 2, [], [1, 3]),
        (5, 1, [0, 1], [2, 3, 4]),
        (5, 2, [1], [3]),
        (3, 1, [0, 1, 2], []),
        (3, 7, [], []),
    ],
)
def test_which_layers_are_sparse(layers: int, step: int, dense: list[int], moe: list[int]) -> None:
    found = read("qwen3_moe", num_hidden_layers=layers, decoder_sparse_step=step, mlp_only_layers=dense)
    assert [layer for layer, is_moe in enumerate(found.moe) if is_moe] == moe
    family = family_named("qwen3_moe")
    assert family.read(family.written(found)).moe == found.moe


def test_an_order_of_layers_that_settings_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of 4 layers \[0, 3\] are MoE .* can be taken"):
        read("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1, 2])


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is true"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias is True, and queries"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("mixtral", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': true or false"),
        ("mixtral", {"hidden_size": 1.5}, "hidden_size is 1.5: a whole number"),
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers is .0.5.: a list of whole numbers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("mixtral", {"rope_parameters": {"rope_theta": 1e6, "mscale": 2}}, "rope_parameters: mixtral knows no field mscale"),
    ],
)
def test_a_field_that_changes_the_math_is_named(kind: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read(kind, **changes)


JUNK: tuple[Any, ...] = (
    *("x", -1, 0, 1.5, float("nan"), float("inf"), True, [], ["x"], [1], {}, {"a": 1}, {"rope_type": [1]}, 10**400),
)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_whatever_a_field_holds_it_is_a_model_or_one_line(kind: str) -> None:
    fields = ("sliding_window", "layer_types", "use_sliding_window", "rope_scaling", "rope_parameters", "head_dim", "vocab_size")
    for name in {*config_of(kind), *fields} - {"model_type"}:
        for junk in (
            "x",
            -1,
            0,
            1.5,
            float("nan"),
            float("inf"),
            True,
            [],
            ["x"],
            [1],
            {},
            {"a": 1},
            {"rope_type": [1]},
            10**400,
        ):
            try:
                assert read(kind, **{name: junk}).model.vocab_size
            except ValueError as error:
                assert "\n" not in str(error)


def test_a_window_beyond_the_longest_sequence_changes_nothing() -> None:
    assert read("mixtral", sliding_window=64).math() == read("mixtral").math()
    assert read("qwen3", use_sliding_window=False, sliding_window=4, max_window_layers=1).math() == read("qwen3").math()


def test_each_model_goes_back_to_its_own_family() -> None:
    for kind in CONFIGS:
        settings = read(kind)
        assert family_for(settings) is family_named(kind)


@pytest.mark.parametrize(
    ("group", "setting", "value"),
    [
        ("model", "bias", True),
        ("model", "norm", "layernorm"),
        ("model", "attention_experts", 2),
        ("model", "shared_d_ff", 8),
        ("model", "positions", "learned"),
        ("router", "scale", 2.0),
        ("router", "kind", "sigmoid"),
        ("router", "renormalize", False),
    ],
)
def test_a_setting_that_a_family_cannot_say_is_named(group: str, setting: str, value: Any) -> None:
    settings = read("mixtral")
    other = replace(settings, **{group: replace(getattr(settings, group), **{setting: value})})
    with pytest.raises(ValueError, match=f"a mixtral model can't have {group}.{setting}={value}"):
        family_named("mixtral").written(other)


RELEASED = {  # what the files of the released models say
    "mixtral_8x7b": {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "initializer_range": 0.02,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        "architectures": ["Qwen3MoeForCausalLM"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_that_of_its_file_in_conf(name: str) -> None:
    config = RELEASED[name]
    found = family_of(config).read(config)
    written = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    ours = Settings(ModelConfig(**written["model"]), RouterConfig(**written["router"]))
    assert found.math() == ours.math() and found.router.balance_loss == ours.router.balance_loss


def test_training_settings_change_no_model() -> None:
    settings = read("mixtral")
    router = replace(settings.router, capacity_factor=1.5, z_loss=0.1, group="micro_batch", noise_std=0.5, kind="noisy_topk")
    other = Settings(replace(settings.model, dropout=0.1, head_dim=8, init_std=0.5, name="mine"), router)
    assert other.math() == settings.math()
    assert replace(settings, model=replace(settings.model, attention_bias="none")).math() == settings.math()  # as auto is, here
