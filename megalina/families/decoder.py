"""A decoder as most families have it: what their config.json files and their tensors' names have in common.

Shapes: V words, D model width, F hidden width of an MLP, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megalina.blocks.heads import attention_bias
from megalina.config import ModelConfig, RouterConfig
from megalina.families.family import Settings
from megalina.families.fields import Fields
from megalina.families.links import Link, View, same

LayerLinks = Callable[[int, Settings], Iterator[Link]]  # of a layer's number

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def decoder_model(fields: Fields, *, eps: float, theta: float, rotary_fraction: float = 1.0, **more: Any) -> ModelConfig:
    """`eps`, `theta`, `rotary_fraction`: where config.json has none; `more`: settings of the family's own."""
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
        **rope(fields, theta, rotary_fraction),
        "max_positions": fields.whole("max_position_embeddings", least=1),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "vocab_size": fields.whole("vocab_size", least=1),
        "init_std": fields.number("initializer_range", 0.02),
    }
    return ModelConfig(**given | more)


def rope(fields: Fields, theta: float, fraction: float = 1.0) -> dict[str, Any]:
    """Settings of RoPE, plain, linear or YaRN, as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) say.

    `theta`, `fraction`: where config.json has none.  ValueError for other kinds, and numbers that nobody reads."""
    given = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    fields.passes("rope_scaling")
    written = Fields(given, fields.family)
    kind = written.any("rope_type", "default", also="type")
    base = written.number("rope_theta", fields.number("rope_theta", theta))
    if fields.number("rope_theta", base) != base:
        raise ValueError(
            f"rope_theta is {fields.number('rope_theta')}, and rope_parameters says {base}: transformers 4 and 5 would differ"
        )
    out: dict[str, Any] = {"rope_theta": base}
    out["rotary_fraction"] = written.number("partial_rotary_factor", fields.number("partial_rotary_factor", fraction))
    if kind not in ("default", "linear", "yarn"):
        raise ValueError(f"rope_type is {kind!r}: {fields.family} can be taken with default, linear or yarn alone")
    if kind != "default":
        out |= {"rope_scaling": kind, "rope_factor": written.number("factor")}
    if kind == "yarn":
        out["rope_original_positions"] = written.whole(
            "original_max_position_embeddings", fields.whole("max_position_embeddings")
        )
        for name, default in YARN.items():
            out[f"rope_{name}"] = written.number(name, default)
        out["rope_truncate"] = written.flag("truncate", True)
    try:
        written.finish()
    except ValueError as error:
        raise ValueError(f"rope_parameters: {error}") from error
    return out


YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": 0.0}


def rope_fields(model: ModelConfig) -> dict[str, Any]:
    """What `rope` reads; where positions are scaled in the spelling of transformers 4, too."""
    scaled: dict[str, Any] = {"rope_type": "default" if model.rope_scaling == "none" else model.rope_scaling}
    if model.rope_scaling != "none":
        scaled["factor"] = model.rope_factor
    if model.rope_scaling == "yarn":
        scaled["original_max_position_embeddings"] = model.rope_original_positions
        numbers = {name: getattr(model, f"rope_{name}") for name in YARN}
        scaled |= {name: value for name, value in numbers.items() if value}
        scaled["truncate"] = model.rope_truncate
    partial = {} if model.rotary_fraction == 1 else {"partial_rotary_factor": model.rotary_fraction}
    out = {"rope_theta": model.rope_theta, **partial, "rope_parameters": {"rope_theta": model.rope_theta, **scaled, **partial}}
    return out if model.rope_scaling == "none" else out | {"rope_scaling": {**scaled, "type": model.rope_scaling}}


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
        **rope_fields(model),
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
    }


def softmax_router(fields: Fields, *, top_k: int, balance_loss: float) -> RouterConfig:
    """Softmax over all experts; weights of the chosen sum to one where `norm_topk_prob` says so.  The numbers: where config.json
    has none."""
    return RouterConfig(
        top_k=fields.whole("num_experts_per_tok", top_k),
        renormalize=fields.flag("norm_topk_prob", False),
        balance_loss=fields.number("router_aux_loss_coef", balance_loss),
    )


def softmax_fields(settings: Settings) -> dict[str, Any]:
    """What `softmax_router` reads."""
    router = settings.router
    return {
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.renormalize,
        "router_aux_loss_coef": router.balance_loss,
    }


def layer_prefix(layer: int) -> tuple[str, str]:
    """Of a layer's tensors, theirs and ours."""
    return f"model.layers.{layer}.", f"layers.{layer}."


def decoder_links(settings: Settings, *parts: LayerLinks) -> Iterator[Link]:
    """Embedding, last norm, output matrix; of each layer, also those of multi-token prediction, its two norms and what the parts
    link."""
    model = settings.model
    yield same("model.embed_tokens.weight", "embedding", model.vocab_size, model.d_model)
    yield same("model.norm.weight", "final_norm.weight", model.d_model)
    if not model.tie_embeddings:
        yield same("lm_head.weight", "head", model.vocab_size, model.d_model)
    for layer in range(model.num_layers + model.mtp_layers):
        theirs, ours = layer_prefix(layer)
        yield same(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", model.d_model)
        yield same(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm.weight", model.d_model)
        for part in parts:
            yield from part(layer, settings)


def attention_links(layer: int, settings: Settings) -> Iterator[Link]:
    """Grouped-query attention, with the biases, norms and sinks that the model has; RoPE turns the same pairs on both sides."""
    theirs, ours = (f"{prefix}{name}" for prefix, name in zip(layer_prefix(layer), ("self_attn.", "attention."), strict=True))
    model, width = settings.model, settings.model.d_model
    q, kv = model.num_heads * settings.head_dim, model.num_kv_heads * settings.head_dim
    sizes = {"q": q, "k": kv, "v": kv}
    for name, size in sizes.items():
        yield same(f"{theirs}{name}_proj.weight", f"{ours}{name}", size, width)
    yield same(f"{theirs}o_proj.weight", f"{ours}proj", width, q)
    biases = attention_bias(model)
    if biases != "none":
        for name, size in sizes.items():
            yield same(f"{theirs}{name}_proj.bias", f"{ours}{name}_bias", size)
    if biases == "all":
        yield same(f"{theirs}o_proj.bias", f"{ours}proj_bias", width)
    if model.qk_norm != "none":
        for name in ("q", "k"):
            size = sizes[name] if model.qk_norm == "projection" else settings.head_dim
            yield same(f"{theirs}{name}_norm.weight", f"{ours}{name}_norm.weight", size)
    if model.attention_sinks:
        yield same(f"{theirs}sinks", f"{ours}sinks", model.num_heads)


def feed_links(layer: int, settings: Settings, *, at: str = "mlp.", names: Sequence[str] = GATE_UP_DOWN) -> Iterator[Link]:
    """A dense MLP, or a router and its experts.  `at`: where they are in their layer."""
    theirs, ours = layer_prefix(layer)
    theirs += at
    model = settings.model
    if settings.is_moe(layer):
        yield same(f"{theirs}gate.weight", f"{ours}router.weight", model.num_experts, model.d_model)
        yield from experts_links(f"{theirs}experts.", f"{ours}experts", model.num_experts, model.d_model, model.d_ff, names)
    else:
        yield from mlp_links(theirs, f"{ours}mlp", model.d_model, settings.dense_d_ff, names)


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
