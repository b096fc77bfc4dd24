"""Plain models: what transformers' Mixtral, Qwen3-MoE, Llama and Qwen3 compute, written out in a few lines of torch over the
tensors of their files; and folders of such models with random weights, norms and routers among them."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from megalina.checkpoint.hugging_face.peer import Answers
from megalina.families.table import family_of

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**TINY, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6},
    "qwen3_moe": {
        **TINY, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "mlp_only_layers": [0], "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"},
    },
    "llama": {**TINY, "intermediate_size": 48, "rope_theta": 1e4, "tie_word_embeddings": True},
    "qwen3": {**TINY, "head_dim": 16, "intermediate_size": 48, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, "bos_token_id": 1, "eos_token_id": 2, **CONFIGS[kind], **changes}


def state_of(config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors under the keys of the files.  Norms are around 1; routers are large, so that scores lie apart."""
    width, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or width // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, width)
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (width,), f"{at}post_attention_layernorm.weight": (width,)}
        shapes |= {f"{at}self_attn.q_proj.weight": (heads * size, width), f"{at}self_attn.o_proj.weight": (width, heads * size)}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (groups * size, width) for n in "kv"}
        if config["model_type"].startswith("qwen3"):
            shapes |= {f"{at}self_attn.{n}_norm.weight": (size,) for n in "qk"}
        if not is_moe(config, i):
            shapes |= {f"{at}mlp.{n}_proj.weight": (config["intermediate_size"], width) for n in ("gate", "up")}
            shapes[f"{at}mlp.down_proj.weight"] = (width, config["intermediate_size"])
            continue
        moe, names, experts, hidden = moe_of(config)
        shapes[f"{at}{moe}.gate.weight"] = (experts, width)
        for e in range(experts):
            shapes |= {f"{at}{moe}.experts.{e}.{n}.weight": (hidden, width) for n in names[:2]}
            shapes[f"{at}{moe}.experts.{e}.{names[2]}.weight"] = (width, hidden)
    random = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=random, dtype=torch.float64)
        scale = 0.1 if len(shape) == 1 else 3.0 / shape[-1] ** 0.5 if key.endswith("gate.weight") else 0.7 / shape[-1] ** 0.5
        out[key] = (values * scale + (len(shape) == 1)).to(dtype)
    return out


def is_moe(config: dict[str, Any], layer: int) -> bool:
    step = config.get("decoder_sparse_step", 1)
    moe = config["model_type"] in ("mixtral", "qwen3_moe")
    return moe and layer not in config.get("mlp_only_layers", []) and (layer + 1) % step == 0


def moe_of(config: dict[str, Any]) -> tuple[str, tuple[str, str, str], int, int]:
    """Where experts are, names of gate, up and down, how many, how wide."""
    if config["model_type"] == "mixtral":
        return "block_sparse_moe", ("w1", "w3", "w2"), config["num_local_experts"], config["intermediate_size"]
    return "mlp", ("gate_proj", "up_proj", "down_proj"), config["num_experts"], config["moe_intermediate_size"]


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor], *, shards: int = 1) -> Path:
    """A Hugging Face folder; more than one shard: with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        part = dict(list(state.items())[i::shards])
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tiny(folder: Path, kind: str, *, seed: int = 0, shards: int = 1, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """FOLDER written; its config and tensors."""
    config = config_of(kind, **changes)
    assert family_of(config).name == kind
    state = state_of(config, seed=seed)
    write(folder, config, state, shards=shards)
    return config, state


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def logits(state: dict[str, Tensor], config: dict[str, Any], token_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """[B, S, V], and of each MoE layer the experts of each token, [T, K], rising."""
    eps, heads, groups = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    batch, length = token_BS.shape
    x, choices = state["model.embed_tokens.weight"][token_BS], []
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    angle = torch.arange(length, dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    cos, sin = (torch.cat([f(angle), f(angle)], 1).to(x.dtype) for f in (torch.cos, torch.sin))

    def turned(y: Tensor) -> Tensor:
        left, right = y.chunk(2, -1)
        return y * cos + torch.cat([-right, left], -1) * sin

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        of = {key.removeprefix(at): value for key, value in state.items() if key.startswith(at)}
        n = norm(x, of["input_layernorm.weight"], eps)
        q, k, v = (
            (n @ of[f"self_attn.{name}_proj.weight"].T).view(batch, length, count, size)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        if "self_attn.q_norm.weight" in of:
            q, k = norm(q, of["self_attn.q_norm.weight"], eps), norm(k, of["self_attn.k_norm.weight"], eps)
        q, k, v = turned(q.transpose(1, 2)), turned(k.transpose(1, 2)), v.transpose(1, 2)
        k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
        score = (q @ k.transpose(2, 3) / size**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        mixed = (score.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + mixed @ of["self_attn.o_proj.weight"].T
        n = norm(x, of["post_attention_layernorm.weight"], eps).flatten(0, 1)
        if not is_moe(config, i):
            x = x + mlp(n, *(of[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))).view_as(x)
            continue
        moe, names, experts, _ = moe_of(config)
        chance = (n @ of[f"{moe}.gate.weight"].T).softmax(1)
        weight, chosen = chance.topk(config["num_experts_per_tok"], dim=1)
        if config.get("norm_topk_prob", config["model_type"] == "mixtral"):
            weight = weight / weight.sum(1, keepdim=True)
        choices.append(chosen.sort(1).values)
        added = torch.zeros_like(n)
        for e in range(experts):
            share = (weight * (chosen == e)).sum(1, keepdim=True)
            added = added + share * mlp(n, *(of[f"{moe}.experts.{e}.{name}.weight"] for name in names))
        x = x + added.view_as(x)
    head = state["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return norm(x, state["model.norm.weight"], eps) @ head.T, choices


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def answers(state: dict[str, Tensor], config: dict[str, Any], token_BS: Tensor) -> Answers:
    leaves = {key: value.detach().clone().requires_grad_() for key, value in state.items()}
    found, choices = logits(leaves, config, token_BS)
    loss = F.cross_entropy(found[:, :-1].flatten(0, 1), token_BS[:, 1:].flatten())
    loss.backward()
    grads = {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}
    return Answers(found.detach(), float(loss.detach()), grads, choices)
