"""What a configuration says of attention's heads, in one layer or in all."""

from dataclasses import replace
from typing import Literal

from megalina.config import ModelConfig


def head_dim(model: ModelConfig) -> int:
    """Numbers of a head of grouped-query attention."""
    return model.head_dim or model.d_model // model.num_heads


def query_size(model: ModelConfig) -> int:
    """Numbers of a head's query, and of its key."""
    return model.qk_nope_head_dim + model.qk_rope_head_dim if model.attention == "mla" else head_dim(model)


def rotary_width(model: ModelConfig) -> int:
    """Numbers of a head's query, and of its key, that positions turn; 0 where they are learned."""
    if model.positions != "rope":
        return 0
    return model.qk_rope_head_dim if model.attention == "mla" else int(head_dim(model) * model.rotary_fraction)


def numbers_kept(model: ModelConfig) -> int:
    """Of each earlier token, in a layer, by generation: keys and values, or what latent attention makes them of."""
    if model.attention == "mla":
        return model.kv_lora_rank + model.qk_rope_head_dim
    return 2 * model.num_kv_heads * head_dim(model)


def tokens_seen(window: int, before: int) -> int:
    """Of so many earlier tokens, those that a token sees where a layer has this window (0: none)."""
    return min(before, window - 1) if window else before


def tokens_of_room(window: int, tokens: int) -> int:
    """Of a text that may grow to so many tokens, those for which generation has room in a layer with this window (0: none).  A
    window has room for a quarter more than it sees, so that it moves once in so many tokens."""
    return min(tokens, window - 1 + max(1, window // 4)) if window else tokens


def numbers_of_room(model: ModelConfig, tokens: int) -> int:
    """What generation has room for in all layers, of a text of so many tokens."""
    windows = (model_of_layer(model, layer).window for layer in range(model.num_layers))
    return sum(numbers_kept(model) * tokens_of_room(window, tokens) for window in windows)


def attention_bias(model: ModelConfig) -> Literal["none", "qkv", "all"]:
    """Which of attention's matrices have biases."""
    match model.attention_bias:
        case "auto":
            return "all" if model.bias else "none"
        case "qkv":
            return "qkv"
        case "all":
            return "all"
    return "none"


def model_of_layer(model: ModelConfig, layer: int) -> ModelConfig:
    """The same with the window that this layer has."""
    if not model.window:
        return model
    every = model.full_attention_every
    sees_all = every > 0 and layer % every == every - 1
    return replace(model, window=0 if sees_all else model.window, full_attention_every=0)


def check_window(model: ModelConfig) -> None:
    """ValueError for layers without a window where none has one."""
    if model.full_attention_every and not model.window:
        raise ValueError(
            f"model.full_attention_every ({model.full_attention_every}) is of layers between those with a window: give "
            "model.window, or set it to 0"
        )


def check_rope(model: ModelConfig) -> None:
    """ValueError for a rotation that can't be, and for numbers that nobody reads."""
    name = model.rope_scaling
    unread = {"rotary_fraction": 1.0, "rope_scaling": "none"} if model.positions != "rope" else {}
    if name == "none":
        unread |= {"rope_factor": 1.0}
    if name != "yarn":
        unread |= {"rope_original_positions": 0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0, "rope_truncate": True}
        unread |= {"rope_mscale": 0.0, "rope_mscale_all_dim": 0.0, "rope_attention_factor": 0.0}
    for setting, value in unread.items():
        if (given := getattr(model, setting)) != value:
            what = f"rope_scaling={name}" if model.positions == "rope" else f"positions={model.positions}"
            raise ValueError(f"model.{setting} ({given}) means nothing with model.{what}: set it to {str(value).lower()}")
    width = rotary_width(model)
    if model.positions == "rope" and (width % 2 or not width):
        sizes = "model.qk_rope_head_dim" if model.attention == "mla" else "model.head_dim or model.num_heads"
        part = "" if model.rotary_fraction == 1 else f" (model.rotary_fraction={model.rotary_fraction:g} of {head_dim(model)})"
        raise ValueError(f"model.positions=rope needs an even head size, not {width}{part}: change {sizes}")
    if name == "yarn" and (
        not model.rope_original_positions or model.rope_theta <= 1 or model.rope_beta_slow > model.rope_beta_fast
    ):
        raise ValueError(
            f"model.rope_scaling=yarn needs model.rope_original_positions ({model.rope_original_positions}) above 0, "
            f"model.rope_theta ({model.rope_theta:g}) above 1 and model.rope_beta_slow ({model.rope_beta_slow:g}) of at most "
            f"model.rope_beta_fast ({model.rope_beta_fast:g}): change what doesn't fit"
        )
