"""Models as published: their sizes by the numbers of their config.json, added up matrix by matrix, and as their cards say."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from megalina.blocks.counts import count_parameters
from megalina.compose import compose
from megalina.validate import check_config

BOTH, OUTPUT, NEITHER = "both embeddings", "the output matrix alone", "neither"  # that a card counts
MLA = {"kv_lora_rank": 512, "nope": 128, "rope": 64, "v": 128}
CONFIGS: dict[str, dict[str, Any]] = {  # as config.json has them, by short names; `mtp`: layers that are not counted
    "deepseek_v2_lite": {
        "layers": 27, "hidden": 2048, "heads": 16, "vocab": 102400, "dense": 1, "dense_size": 10944, "experts": 64, "top_k": 6,
        "size": 1408, "shared": 2 * 1408, **MLA,
    },
    "deepseek_v3": {
        "layers": 61, "hidden": 7168, "heads": 128, "vocab": 129280, "dense": 3, "dense_size": 18432, "experts": 256, "top_k": 8,
        "size": 2048, "shared": 2048, "q_lora_rank": 1536, "mtp": 1, **MLA,
    },
    "moonlight_16b_a3b": {
        "layers": 27, "hidden": 2048, "heads": 16, "vocab": 163840, "dense": 1, "dense_size": 11264, "experts": 64, "top_k": 6,
        "size": 1408, "shared": 2 * 1408, **MLA,
    },
    "kimi_k2": {
        "layers": 61, "hidden": 7168, "heads": 64, "vocab": 163840, "dense": 1, "dense_size": 18432, "experts": 384, "top_k": 8,
        "size": 2048, "shared": 2048, "q_lora_rank": 1536, **MLA,
    },
    "glm_4_5_air": {
        "layers": 46, "hidden": 4096, "heads": 96, "kv_heads": 8, "head": 128, "qkv_bias": True, "vocab": 151552, "dense": 1,
        "dense_size": 10944, "experts": 128, "top_k": 8, "size": 1408, "shared": 1408, "mtp": 1,
    },
    "gpt_oss_20b": {
        "layers": 24, "hidden": 2880, "heads": 64, "kv_heads": 8, "head": 64, "qkv_bias": True, "o_bias": True, "sinks": True,
        "vocab": 201088, "experts": 32, "top_k": 4, "size": 2880, "biases": True,
    },
    "gpt_oss_120b": {
        "layers": 36, "hidden": 2880, "heads": 64, "kv_heads": 8, "head": 64, "qkv_bias": True, "o_bias": True, "sinks": True,
        "vocab": 201088, "experts": 128, "top_k": 4, "size": 2880, "biases": True,
    },
    "qwen2_moe_57b": {
        "layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "head": 128, "qkv_bias": True, "vocab": 151936, "experts": 64,
        "top_k": 8, "size": 2560, "shared": 20480, "shared_gate": True,
    },
}  # fmt: skip
PUBLISHED = {  # billions, as they are printed, and which embeddings each number has
    "deepseek_v2_lite": (("15.7", BOTH), ("2.4", OUTPUT)),
    "deepseek_v3": (("671", BOTH), ("37", OUTPUT)),
    "moonlight_16b_a3b": (("16", BOTH), ("3", BOTH)),
    "kimi_k2": (("1026", BOTH), ("32.9", BOTH)),  # the paper prints 1.04 T and 32.6 B, which its config.json does not give
    "glm_4_5_air": (("106", NEITHER), ("12", NEITHER)),
    "gpt_oss_20b": (("20.9", BOTH), ("3.6", OUTPUT)),
    "gpt_oss_120b": (("116.8", BOTH), ("5.1", OUTPUT)),
    "qwen2_moe_57b": (("57.4", BOTH), ("14.2", BOTH)),
}


def written_out(c: Mapping[str, Any], *, active: bool) -> int:
    """All matrices, norms and biases; with `active` those that one token uses."""
    h, n = c["hidden"], c["heads"]
    if "kv_lora_rank" in c:
        rank, query = c["kv_lora_rank"], n * (c["nope"] + c["rope"])
        low = c.get("q_lora_rank", 0)
        attention = low * (h + 1 + query) if low else h * query
        attention += h * (rank + c["rope"]) + rank + rank * n * (c["nope"] + c["v"]) + n * c["v"] * h
    else:
        q, kv = n * c["head"], c["kv_heads"] * c["head"]
        attention = 2 * h * q + 2 * h * kv
        attention += (q + 2 * kv) * c.get("qkv_bias", False) + h * c.get("o_bias", False) + n * c.get("sinks", False)
    expert = 3 * h * c["size"] + (2 * c["size"] + h) * c.get("biases", False)
    moe = c["experts"] * (h + c.get("biases", False)) + (c["top_k"] if active else c["experts"]) * expert
    moe += 3 * h * c.get("shared", 0) + h * c.get("shared_gate", False)
    dense_layers = c.get("dense", 0)
    feed = dense_layers * 3 * h * c.get("dense_size", 0) + (c["layers"] - dense_layers) * moe
    return 2 * c["vocab"] * h + c["layers"] * (attention + 2 * h) + feed + h


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_model_has_its_size(name: str) -> None:
    config, c = compose([f"model={name}"]), CONFIGS[name]
    check_config(config, 1)
    assert config.model.mtp_layers == c.get("mtp", 0)
    model, words = replace(config.model, mtp_layers=0), config.model.vocab_size
    counts = count_parameters(model, config.router, vocab_size=words, seq_len=128)
    assert (counts.total, counts.active) == (written_out(c, active=False), written_out(c, active=True))
    left_out = {BOTH: 0, OUTPUT: 1, NEITHER: 2}
    for number, (printed, counted) in zip((counts.total, counts.active), PUBLISHED[name], strict=True):
        found = (number - left_out[counted] * words * model.d_model) / 1e9
        digits = len(printed.partition(".")[2])
        assert abs(found - float(printed)) < 0.52 * 10**-digits or abs(found / float(printed) - 1) < 0.005, found


def test_multi_token_prediction_is_a_layer_more() -> None:
    """Of DeepSeek-V3: what its report says of it, less the embedding and the output matrix, which it shares."""
    config = compose(["model=deepseek_v3"])
    both = [
        count_parameters(replace(config.model, mtp_layers=k), config.router, vocab_size=129280, seq_len=128).total for k in (0, 1)
    ]
    assert (both[1] - both[0]) / 1e9 == pytest.approx(11.6, abs=0.05)
