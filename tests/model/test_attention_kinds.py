"""Attention of each kind against a formula written out, token by token, and with what generation keeps of earlier tokens."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.heads import numbers_kept, numbers_of_room
from megalina.compose import compose
from megalina.config import ModelConfig
from megalina.model.attention import KeyValues
from megalina.model.gpt import GPT
from megalina.model.init import Cut, initialize, spec_of
from megalina.model.rope import attention_factor, frequencies, score_factor
from megalina.model.tokens import TokenShare
from megalina.validate import check_config
from megalina.verify.start import shake
from tests.serve.small_engine import batch_of, small_gpt, tokens_of

YARN: dict[str, Any] = {
    "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 16, "rope_beta_fast": 2.0, "rope_beta_slow": 0.1,
}  # fmt: skip
MLA: dict[str, Any] = {
    "attention": "mla", "num_kv_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "OLMoE": {"qk_norm": "projection"},
    "gpt-oss": {"attention_sinks": True, "window": 3, "full_attention_every": 2, "attention_bias": "all", **YARN},
    "GLM-4.5": {"qk_norm": "head", "rotary_fraction": 0.5, "attention_bias": "qkv"},
    "partial, yarn, window": {"rotary_fraction": 0.75, "window": 4, **YARN},
    "biases in MLPs alone": {"bias": True, "attention_bias": "none"},
    "DeepSeek-V2-Lite": {**MLA, **YARN, "rope_mscale": 0.7, "rope_mscale_all_dim": 0.7, "v_head_dim": 12},
    "DeepSeek-V3": {**MLA, "q_lora_rank": 10, **YARN, "rope_mscale": 1.0, "rope_mscale_all_dim": 1.0},
    "latent, window, sinks": {**MLA, "window": 3, "full_attention_every": 2, "attention_sinks": True},
}


def gpt_of(kind: str) -> GPT:
    gpt = small_gpt(**{"num_layers": 2, **KINDS[kind]})
    with torch.no_grad():
        shake(gpt, 3, Cut())
    return gpt


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, position: int, model: ModelConfig) -> Tensor:
    """The first numbers of one vector, as many as there are frequencies for twice over, turned pair by pair."""
    half = len(x) // 2
    out = x.clone()
    for i, frequency in enumerate(frequencies(model, len(x)).tolist()):
        cos, sin = (f(position * frequency) * attention_factor(model) for f in (math.cos, math.sin))
        out[i], out[half + i] = x[i] * cos - x[half + i] * sin, x[half + i] * cos + x[i] * sin
    return out


def weighed(scores: list[Tensor], values: list[Tensor], sink: Tensor | None) -> Tensor:
    """A softmax over scores and perhaps a sink; what it gives of values."""
    exponentials = [score.exp() for score in scores]
    total = sum(exponentials) + (0 if sink is None else sink.exp())
    return sum((e / total * v for e, v in zip(exponentials, values, strict=True)), torch.zeros_like(values[0]))


def grouped(a: Any, n_SD: Tensor, model: ModelConfig, window: int) -> Tensor:
    """Grouped-query attention of one sequence."""
    length, size = len(n_SD), model.head_dim or model.d_model // model.num_heads
    q, k, v = (n_SD @ w.T + (0 if b is None else b) for w, b in ((a.q, a.q_bias), (a.k, a.k_bias), (a.v, a.v_bias)))
    if model.qk_norm == "projection":
        q, k = rms(q, a.q_norm.weight, model.norm_eps), rms(k, a.k_norm.weight, model.norm_eps)
    q, k, v = (x.view(length, -1, size) for x in (q, k, v))
    if model.qk_norm == "head":
        q, k = rms(q, a.q_norm.weight, model.norm_eps), rms(k, a.k_norm.weight, model.norm_eps)
    turns = int(size * model.rotary_fraction)

    def placed(x: Tensor, position: int) -> Tensor:
        return torch.cat([turned(x[:turns], position, model), x[turns:]])

    out = torch.zeros_like(n_SD)
    for i in range(length):
        seen = range(max(0, i - window + 1) if window else 0, i + 1)
        heads = []
        for h in range(model.num_heads):
            g = h * model.num_kv_heads // model.num_heads
            scores = [placed(q[i, h], i) @ placed(k[j, g], j) / size**0.5 for j in seen]
            heads.append(weighed(scores, [v[j, g] for j in seen], None if a.sinks is None else a.sinks[h]))
        out[i] = a.proj @ torch.cat(heads) + (0 if a.proj_bias is None else a.proj_bias)
    return out


def latent(a: Any, n_SD: Tensor, model: ModelConfig, window: int) -> Tensor:
    """Latent attention of one sequence, as in DeepSeek-V2, equations 9 to 19 and 37 to 47."""
    length, still, value = len(n_SD), model.qk_nope_head_dim, model.v_head_dim
    q = n_SD @ a.q.T if a.q is not None else rms(n_SD @ a.q_down.T, a.q_norm.weight, 1e-6) @ a.q_up.T
    q = q.view(length, model.num_heads, -1)
    c, shared = (n_SD @ a.kv_down.T).split([model.kv_lora_rank, model.qk_rope_head_dim], 1)
    up = (rms(c, a.kv_norm.weight, 1e-6) @ a.kv_up.T).view(length, model.num_heads, still + value)
    scale = (still + model.qk_rope_head_dim) ** -0.5 * score_factor(model)
    out = torch.zeros_like(n_SD)
    for i in range(length):
        seen = range(max(0, i - window + 1) if window else 0, i + 1)
        heads = []
        for h in range(model.num_heads):
            scores = [
                (q[i, h, :still] @ up[j, h, :still] + turned(q[i, h, still:], i, model) @ turned(shared[j], j, model)) * scale
                for j in seen
            ]
            heads.append(weighed(scores, [up[j, h, still:] for j in seen], None if a.sinks is None else a.sinks[h]))
        out[i] = a.proj @ torch.cat(heads)
    return out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_its_formula(kind: str) -> None:
    gpt = gpt_of(kind)
    model, batch = gpt.config, batch_of(tokens_of(0, sequences=1))
    x_TD = torch.randn(batch.tokens_BS.shape[1], 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(gpt.layers):
        with torch.no_grad():
            n_TD = layer.attention_norm(x_TD)
            sees_all = model.full_attention_every and i % model.full_attention_every == model.full_attention_every - 1
            window = 0 if sees_all else model.window
            a = layer.attention
            added_TD = latent(a, n_TD, model, window) if model.attention == "mla" else grouped(a, n_TD, model, window)
            torch.testing.assert_close(layer.attend(x_TD, batch), x_TD + added_TD, rtol=1e-12, atol=1e-12)


def tokens_at(batch: Batch, at: slice) -> Batch:
    names = ("tokens_BS", "labels_BS", "loss_mask_BS", "valid_BS", "position_BS")
    out: Batch = replace(batch, **{name: getattr(batch, name)[:, at] for name in names})
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_are_all_at_once(kind: str) -> None:
    """Also some at once behind others, and after padding in front, which nobody sees."""
    gpt = gpt_of(kind)
    batch = batch_of(tokens_of(0, sequences=2))
    length = batch.tokens_BS.shape[1]
    for documents in (None, torch.tensor([[0] * 2 + [1] * (length - 2), [1] * length])):
        past = gpt.key_values(length)
        with torch.inference_mode():
            whole = gpt.hidden(replace(batch, document_BS=documents))[0].view(2, length, -1)
            for begin, end in ((0, 3), (3, 4), (4, 5), (5, 8), (8, length)):
                so_far = None if documents is None else documents[:, :end]
                part = replace(tokens_at(batch, slice(begin, end)), document_BS=so_far)
                found = gpt.hidden(part, past)[0].view(2, end - begin, -1)
                torch.testing.assert_close(found, whole[:, begin:end], rtol=1e-12, atol=1e-12)
        assert sum(of.numbers * of.room for of in past) == numbers_of_room(gpt.config, length)


def half_of(gpt: GPT, rank: int) -> GPT:
    """What one of two tensor-parallel ranks has of it; its attention alone has the same weights."""
    words = gpt.vocab_size
    sizes = {"vocab_size": words, "padded_vocab": words + 1, "max_positions": gpt.blocks.whole.max_positions, "seed": 1}
    half, cut = GPT(gpt.config, gpt.router, share=TokenShare(2, rank), **sizes), Cut({"tp": (rank, 2)})
    initialize(half, seed=1, dtype=torch.float64, cut=cut)
    whole = dict(gpt.named_parameters())
    with torch.no_grad():
        for name, p in ((name, p) for name, p in half.named_parameters() if "attention" in name):
            p.copy_(cut.local(whole[name].view(spec_of(p).shape), spec_of(p)).reshape(p.shape))
    return half


@pytest.mark.parametrize("kind", KINDS)
def test_halves_of_the_heads_give_the_whole_and_its_gradients(kind: str) -> None:
    """As under tensor parallelism: what is copied has a part of its gradient on each rank.  So do their largest logits."""
    gpt = gpt_of(kind)
    halves = [half_of(gpt, rank) for rank in range(2)]
    batch, random = batch_of(tokens_of(0, sequences=2)), torch.Generator().manual_seed(0)
    x_TD, dy_TD = (torch.randn(batch.tokens_BS.numel(), 32, dtype=torch.float64, generator=random) for _ in range(2))
    inputs = [x_TD.clone().requires_grad_() for _ in range(3)]
    logits: list[Tensor] = []
    parts: list[Tensor] = []
    whole_TD = gpt.layers[0].attention(inputs[0], batch, logits=logits)
    functions = [half.layers[0].functions["attention"] for half in halves]
    if gpt.config.qk_norm == "projection":
        projected = [f.attention_qkv(x) for f, x in zip(functions, inputs[1:], strict=True)]  # type: ignore[attr-defined]
        square_T2 = sum(squares for *_, squares in projected)
        added = [f.attention_core(*qkv, square_T2, batch) for f, (*qkv, _) in zip(functions, projected, strict=True)]  # type: ignore[attr-defined]
    else:
        added = [f.attention_heads(x, batch, logits=parts) for f, x in zip(functions, inputs[1:], strict=True)]  # type: ignore[attr-defined]
        torch.testing.assert_close(torch.cat(parts), logits[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(added), whole_TD, rtol=1e-12, atol=1e-12)
    torch.autograd.backward([whole_TD, *added], [dy_TD] * 3)
    torch.testing.assert_close(inputs[1].grad + inputs[2].grad, inputs[0].grad, rtol=1e-11, atol=1e-11)
    for name, p in gpt.layers[0].attention.named_parameters():
        if p.grad is None:  # the output's bias is added by the residual
            continue
        of_halves = [dict(half.layers[0].attention.named_parameters())[name].grad for half in halves]
        cut_at = spec_of(p).sharded.get("tp")
        found = sum(of_halves) if cut_at is None else torch.cat(of_halves, cut_at)
        torch.testing.assert_close(found, p.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["DeepSeek-V2-Lite", "DeepSeek-V3", "latent, window, sinks"])
def test_absorbed_attention_is_the_plain_one_and_keeps_the_compressed_token_alone(kind: str) -> None:
    gpt = gpt_of(kind)
    model, heads = gpt.config, gpt.layers[0].attention
    random = torch.Generator().manual_seed(1)
    q_BSHx, c_BSc, turned_BSr = (
        torch.randn(2, 7, *shape, dtype=torch.float64, generator=random) for shape in ((4, 10), (12,), (4,))
    )
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2] * 7])
    with torch.no_grad():
        plain = heads.attended(q_BSHx, c_BSc, turned_BSr, document, None)
        kept = torch.cat([c_BSc, turned_BSr], -1)
        torch.testing.assert_close(heads.absorbed(q_BSHx, kept, document), plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(heads.absorbed(q_BSHx[:, -1:], kept, document), plain[:, -1:], rtol=1e-12, atol=1e-12)
    past = [KeyValues() for _ in gpt.layers]
    gpt.hidden(batch_of(tokens_of(0, sequences=1)), past)
    assert [of.numbers for of in past] == [numbers_kept(model)] * 2 == [12 + 4] * 2
    full = small_gpt(num_layers=2)
    past = [KeyValues() for _ in full.layers]
    full.hidden(batch_of(tokens_of(0, sequences=1)), past)
    assert [of.numbers for of in past] == [2 * 2 * 8] * 2  # keys and values of two heads of eight numbers


REFUSED = {
    "model.attention=mla needs model.kv_lora_rank": ("model.attention=mla",),
    r"gives each head its own keys and values: set model.num_kv_heads \(2\)": ("MLA", "model.num_kv_heads=2"),
    r"model.attention=mla has no model.attention_experts \(2\)": ("MLA", "model.attention_experts=2"),
    r"model.attention=mla has no model.qk_norm \(head\): set it to none": ("MLA", "model.qk_norm=head"),
    "model.attention=mla has no biases": ("MLA", "model.bias=true"),
    "positions=learned can't be": ("MLA", "model.positions=learned"),
    r"needs an even head size, not 3: change model.qk_rope_head_dim": ("MLA", "model.qk_rope_head_dim=3"),
    r"model.v_head_dim \(8\) is of model.attention=mla alone": ("model.v_head_dim=8",),
    r"model.full_attention_every \(2\) is of layers between": ("model.full_attention_every=2",),
    r"model.rope_factor \(2.0\) means nothing with model.rope_scaling=none": ("model.rope_factor=2",),
    r"model.rope_mscale \(1.0\) means nothing with model.rope_scaling=linear": (
        "model.rope_scaling=linear",
        "model.rope_mscale=1",
    ),
    r"model.rotary_fraction \(0.5\) means nothing with model.positions=learned": (
        "model.rotary_fraction=0.5",
        "model.positions=learned",
    ),
    r"not 3 \(model.rotary_fraction=0.2 of 16\)": ("model.rotary_fraction=0.2",),
    r"yarn needs model.rope_original_positions \(0\) above 0": ("model.rope_scaling=yarn",),
    r"model.rope_beta_slow \(3\) of at most model.rope_beta_fast \(2\)": (
        *("model.rope_scaling=yarn", "model.rope_original_positions=64", "model.rope_beta_fast=2", "model.rope_beta_slow=3"),
    ),
    "model.attention_experts .2. and model.qk_norm=projection": ("model.attention_experts=2", "model.qk_norm=projection"),
    "model.qk_norm=True is not one of none, head, projection": ("model.qk_norm=true",),
}
WORDS = (
    "model.attention=mla",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=4",
    "model.v_head_dim=8",
)


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_contradict_each_other_are_refused(message: str) -> None:
    words = [word for given in REFUSED[message] for word in (WORDS if given == "MLA" else (given,))]
    with pytest.raises(ValueError, match=message):
        check_config(compose(["model=tiny", *words]), 1)
    check_config(compose(["model=tiny", *WORDS]), 1)
