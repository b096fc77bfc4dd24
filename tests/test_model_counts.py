"""Parameter counts: published sizes, matrices written out, and the model itself, built without memory."""

import math
from dataclasses import replace

import pytest
import torch

from megalina.blocks.counts import ParameterCounts, count_parameters
from megalina.compose import compose
from megalina.config import PretrainConfig, is_moe_layer, padded_vocab_size
from megalina.model.gpt import GPT
from tests.conf_files import MODELS, ROUTERS, with_setting

PUBLISHED = {  # total and active parameters as the model cards round them
    "olmoe_1b_7b": ("6.9", "1.3"),
    "mixtral_8x7b": ("46.7", "12.9"),
    "qwen3_30b_a3b": ("30.5", "3.3"),
}


def counts_of(name: str) -> tuple[PretrainConfig, ParameterCounts]:
    config = with_setting(f"model={name}")
    sizes = {"vocab_size": config.model.vocab_size, "seq_len": config.train.seq_len}
    return config, count_parameters(config.model, config.router, **sizes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name: str) -> None:
    _, counts = counts_of(name)
    total, active = PUBLISHED[name]
    assert f"{counts.total / 1e9:.1f}" == total
    assert abs(counts.active / 1e9 - float(active)) < 0.06


@pytest.mark.parametrize(
    ("layers", "experts", "published_m"), [(12, 4, 117), (24, 4, 233), (36, 4, 349), (12, 16, 419), (24, 16, 838), (36, 16, 1255)]
)
def test_lina_models_have_their_published_sizes(layers: int, experts: int, published_m: float) -> None:
    config, counts = counts_of(f"lina_{layers}l_{experts}e")
    relative = layers * config.model.d_model**2  # Transformer-XL's fifth matrix
    assert (counts.without_embeddings + relative) / 1e6 == pytest.approx(published_m, rel=0.005)
    assert counts.num_moe_layers == layers


def test_gpt2_without_moe_has_124_million_parameters() -> None:
    config = compose(["model=gpt2_moe", "model.dense_layers_first=12"])
    counts = count_parameters(config.model, config.router, vocab_size=50257, seq_len=1024)
    assert counts.total == 124_439_808  # the published checkpoint
    _, moe = counts_of("gpt2_moe")
    assert moe.total - counts.total == 6 * (7 * moe.expert + 8 * 768)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "shape", [(), ("model.bias=true", "model.moe_every=2", "model.shared_d_ff=32", "model.positions=learned")]
)
def test_counts_are_those_of_the_model_with_every_router(router: str, shape: tuple[str, ...]) -> None:
    config = compose(["model=tiny", "model.num_layers=4", f"router={router}", *shape])
    model, sizes = config.model, {"vocab_size": 512, "seq_len": 32}
    gpt = GPT(model, config.router, vocab_size=512, max_positions=32, seed=0)  # on the meta device
    counts = count_parameters(model, config.router, **sizes)
    assert counts.total == sum(p.numel() for p in gpt.parameters())
    moe = [layer for layer in gpt.layers if layer.is_moe]
    assert counts.num_moe_layers == len(moe)
    experts = sum(p.numel() for layer in moe for name, p in layer.named_parameters() if name.startswith("experts."))
    assert counts.expert * model.num_experts * len(moe) == experts


@pytest.mark.parametrize(
    "settings", [(), ("model.bias=true", "model.norm=layernorm"), ("model.activation=relu", "model.qk_norm=head")]
)
def test_counts_are_those_of_matrices_written_out(settings: tuple[str, ...]) -> None:
    shape = ("model.num_kv_heads=2", "model.shared_d_ff=32", "model.moe_every=2", "model.num_layers=4")
    config = compose(["model=tiny", *shape, *settings])
    model = config.model
    bias, gates = model.bias, 2 if model.activation == "swiglu" else 1
    norm = [(64,), (64,)] if model.norm == "layernorm" else [(64,)]

    def mlp(width: int) -> list[tuple[int, ...]]:
        return [(64, width)] * gates + [(width, 64)] + ([(width,)] * gates + [(64,)]) * bias

    attention: list[tuple[int, ...]] = [(64, 64), (64, 32), (64, 32), (64, 64)]
    attention += [(64,), (32,), (32,), (64,)] * bias + [(16,), (16,)] * (model.qk_norm == "head")
    dense_layer = attention + norm * 2 + mlp(2 * 128)
    moe_layer = attention + norm * 2 + mlp(32) + [(64, 4)] + mlp(128) * 4
    shapes = [(512, 64), *norm, *dense_layer, *moe_layer, *dense_layer, *moe_layer]
    counts = count_parameters(model, config.router, vocab_size=512, seq_len=128)
    assert counts.total == sum(map(math.prod, shapes))
    assert counts.total - counts.active == 2 * 2 * counts.expert
    assert [is_moe_layer(model, layer) for layer in range(4)] == [False, True, False, True]


VARIANTS = (
    "router=hash",
    "model.bias=true",
    "model.activation=gelu",
    "model.shared_d_ff=64",
    "model.moe_every=2",
    "model.norm=layernorm",
    "model.qk_norm=head",
    "model.tie_embeddings=false",
    "model.dense_layers_first=1",
)


@pytest.mark.full
def test_counts_are_those_of_the_model_built_without_memory(subtests: pytest.Subtests) -> None:
    for override in [*(f"model={name}" for name in MODELS), *VARIANTS]:
        with subtests.test(override):
            config = with_setting(override)
            shape = replace(config.model, num_layers=min(config.model.num_layers, 4))  # the others are as these
            vocab_size = shape.vocab_size or config.data.vocab_size
            positions = shape.max_positions or config.train.seq_len
            with torch.device("meta"):
                model = GPT(shape, config.router, vocab_size=vocab_size, max_positions=positions, seed=0)
            counts = count_parameters(shape, config.router, vocab_size=vocab_size, seq_len=config.train.seq_len)
            assert counts.total == sum(parameter.numel() for parameter in model.parameters())


def test_the_vocabulary_is_padded_on_each_tensor_parallel_rank() -> None:
    cases = {(1, 1): 128, (128, 1): 128, (129, 1): 256, (129, 4): 512, (50257, 1): 50304}
    assert {case: padded_vocab_size(*case) for case in cases} == cases
