"""A decoder as most families have it: what their config.json files and their tensors' names have in common.

Shapes: V words, D model width, F hidden width of an MLP, E experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megalina.config import ModelConfig
from megalina.families.family import Settings
from megalina.families.fields import Fields
from megalina.families.links import Link, View, same

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def decoder_model(fields: Fields, *, eps: float, theta: float, **more: Any) -> ModelConfig:
    """`eps`, `theta`: where config.json has none; `more`: settings of the family's own."""
    fields.needs("hidden_act", "silu", why="experts and MLPs are gated by silu (swiglu)")
    fields.needs("attention_dropout", 0, why="attention weights have no dropout here")
    heads = fields.whole("num_attention_heads", least=1)
    given: dict[str, Any] = {
        "name": fields.family,
        "num_layers": fields.whole("num_hidden_layers", least=1),
        "d_model": fields.whole("hidden_size", least=1),
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", heads),
        "head_dim": fields.whole("head_dim", 0),
        "norm_eps": fields.number("rms_norm_eps", eps),
        "rope_theta": rope_theta(fields, theta),
        "max_positions": fields.whole("max_position_embeddings", least=1),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "vocab_size": fields.whole("vocab_size", least=1),
        "init_std": fields.number("initializer_range", 0.02),
    }
    return ModelConfig(**given | more)


def rope_theta(fields: Fields, default: float) -> float:
    """Of plain RoPE, as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) write it.

    ValueError for scaled, partial or layered RoPE."""
    written = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    fields.passes("rope_scaling")
    theta = written.pop("rope_theta", None)
    kind = written.pop("rope_type", None) or written.pop("type", None) or "default"
    written.pop("type", None)
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}: {fields.family} can be taken with plain RoPE alone (rope_type default)")
    fields.needs("partial_rotary_factor", 1, why="all numbers of a head are rotated")
    if written.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("rope_parameters has a partial_rotary_factor, and all numbers of a head are rotated: it must be 1")
    if written:
        raise ValueError(f"rope_parameters has {', '.join(written)}, which {fields.family} doesn't know: it may change the math")
    if theta is None:
        return fields.number("rope_theta", default)
    if fields.number("rope_theta", theta) != theta:
        raise ValueError(
            f"rope_theta is {fields.number('rope_theta')}, and rope_parameters says {theta}: transformers 4 and 5 would differ"
        )
    return float(theta)


def refuse_window(fields: Fields, *, switch: str = "") -> None:
    """ValueError for attention that doesn't reach back over the whole sequence; `switch`: a field without which there is none."""
    fields.passes("sliding_window", "max_window_layers")
    if switch and not fields.flag(switch, False):
        return
    longest = fields.whole("max_position_embeddings")
    if (window := fields.whole("sliding_window", longest)) < longest:
        raise ValueError(
            f"sliding_window is {window}, and attention reaches back over all max_position_embeddings "
            f"({longest}): only null can be taken"
        )


def refuse_layer_types(fields: Fields) -> None:
    kinds = fields.words("layer_types")
    if other := sorted({*kinds} - {"full_attention"}):
        raise ValueError(f"layer_types has {', '.join(other)}: only full_attention can be taken")


def decoder_config(settings: Settings) -> dict[str, Any]:
    """What `decoder_model` reads, in the spelling of transformers 5 and, of RoPE, of 4 too."""
    model = settings.model
    return {
        "hidden_act": "silu",
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": settings.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
    }


def sparse_layers(fields: Fields, experts: int) -> dict[str, int]:
    """`dense_layers_first` and `moe_every` of `decoder_sparse_step` and `mlp_only_layers`.  ValueError for an order of dense and
    MoE layers that these two can't say."""
    step, layers = fields.whole("decoder_sparse_step", 1), fields.whole("num_hidden_layers")
    dense = fields.numbers("mlp_only_layers")
    if step < 1:
        raise ValueError(f"decoder_sparse_step is {step}: 1 or more is needed")
    moe = [layer not in dense and experts > 0 and (layer + 1) % step == 0 for layer in range(layers)]
    for every in range(1, layers + 1):
        for first in range(layers + 1):
            if moe == [layer >= first and (layer - first) % every == every - 1 for layer in range(layers)]:
                return {"dense_layers_first": first, "moe_every": every}
    raise ValueError(
        f"of {layers} layers {[i for i, one in enumerate(moe) if one]} are MoE (decoder_sparse_step {step}, mlp_only_layers "
        f"{dense}): only dense layers at the bottom, then every n-th layer MoE, can be taken"
    )


def sparse_fields(settings: Settings) -> dict[str, Any]:
    """What `sparse_layers` reads."""
    model = settings.model
    if model.dense_layers_first % model.moe_every == 0 and settings.moe == [
        (layer + 1) % model.moe_every == 0 for layer in range(model.num_layers)
    ]:
        return {"decoder_sparse_step": model.moe_every, "mlp_only_layers": []}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer, moe in enumerate(settings.moe) if not moe]}


def layer_prefix(layer: int) -> tuple[str, str]:
    """Of a layer's tensors, theirs and ours."""
    return f"model.layers.{layer}.", f"layers.{layer}."


def end_links(settings: Settings) -> Iterator[Link]:
    """Embedding, last norm, output matrix."""
    model = settings.model
    yield same("model.embed_tokens.weight", "embedding", model.vocab_size, model.d_model)
    yield same("model.norm.weight", "final_norm.weight", model.d_model)
    if not model.tie_embeddings:
        yield same("lm_head.weight", "head", model.vocab_size, model.d_model)


def norm_links(layer: int, settings: Settings) -> Iterator[Link]:
    """The two norms of a layer."""
    theirs, ours = layer_prefix(layer)
    yield same(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", settings.model.d_model)
    yield same(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm.weight", settings.model.d_model)


def attention_links(layer: int, settings: Settings) -> Iterator[Link]:
    """Grouped-query attention; RoPE turns the same pairs on both sides."""
    theirs, ours = (f"{prefix}{name}" for prefix, name in zip(layer_prefix(layer), ("self_attn.", "attention."), strict=True))
    model, width = settings.model, settings.model.d_model
    q, kv = model.num_heads * settings.head_dim, model.num_kv_heads * settings.head_dim
    yield same(f"{theirs}q_proj.weight", f"{ours}q", q, width)
    yield same(f"{theirs}k_proj.weight", f"{ours}k", kv, width)
    yield same(f"{theirs}v_proj.weight", f"{ours}v", kv, width)
    yield same(f"{theirs}o_proj.weight", f"{ours}proj", width, q)


def head_norm_links(layer: int, settings: Settings) -> Iterator[Link]:
    """RMSNorms of each head's queries and keys."""
    theirs, ours = layer_prefix(layer)
    for name in ("q_norm", "k_norm"):
        yield same(f"{theirs}self_attn.{name}.weight", f"{ours}attention.{name}.weight", settings.head_dim)


def mlp_links(theirs: str, ours: str, width: int, d_ff: int, names: Sequence[str] = GATE_UP_DOWN) -> Iterator[Link]:
    """A gated MLP, whose first matrix is [2, F, D] here: gate, then up.  `names`: of their gate, up and down."""
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    for half, key in enumerate((gate, up)):
        yield Link(View(key, (d_ff, width)), View(f"{ours}.w1", (2, d_ff, width), at=(half,)))
    yield same(down, f"{ours}.w2", width, d_ff)


def experts_links(
    theirs: str, ours: str, experts: int, width: int, d_ff: int, names: Sequence[str] = GATE_UP_DOWN
) -> Iterator[Link]:
    """Experts with keys of their own, in one tensor here: [E, 2F, D], of each gate rows, then up rows; and [E, D, F]."""
    for e in range(experts):
        gate, up, down = (f"{theirs}{e}.{name}.weight" for name in names)
        for rows, key in ((slice(0, d_ff), gate), (slice(d_ff, 2 * d_ff), up)):
            yield Link(View(key, (d_ff, width)), View(f"{ours}.w1", (experts, 2 * d_ff, width), at=(e, rows)))
        yield Link(View(down, (width, d_ff)), View(f"{ours}.w2", (experts, width, d_ff), at=(e,)))
