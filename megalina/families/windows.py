"""Windows: in which layers a token sees only those before it that are near (`sliding_window`, `layer_types`)."""

from collections.abc import Sequence
from typing import Any

from megalina.blocks.heads import model_of_layer
from megalina.families.family import Settings
from megalina.families.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


def window(fields: Fields, *, switch: str = "") -> int:
    """Tokens that a token sees in every layer; 0: all before it.  `switch`: a field without which there is no window; with it,
    some layers would have one, which is refused."""
    fields.passes("max_window_layers", "sliding_window")
    if switch:
        if fields.flag(switch, False):
            raise ValueError(f"{switch} is true: only layers that see all of a sequence can be taken")
        return 0
    longest = fields.whole("max_position_embeddings")
    found = fields.whole("sliding_window", longest, least=1)
    return 0 if found >= longest else found


def refuse_layer_types(fields: Fields) -> None:
    kinds = fields.words("layer_types")
    if other := sorted({*kinds} - {FULL}):
        raise ValueError(f"layer_types has {', '.join(other)}: only {FULL} can be taken")


def layer_windows(fields: Fields, size: int, kinds: Sequence[str]) -> dict[str, int]:
    """`window` and `full_attention_every`.  `size`: tokens that a token sees in a layer with a window, 0: not given; `kinds`: of
    each layer, where config.json has none.  ValueError for an order of layers that these two can't say."""
    layers, longest = fields.whole("num_hidden_layers"), fields.whole("max_position_embeddings")
    kinds = fields.words("layer_types") or kinds
    full = [kind == FULL for kind in kinds]
    if len(kinds) != layers or {*kinds} - {FULL, SLIDING}:
        raise ValueError(f"layer_types is {list(kinds)}: {layers} words are needed, each {FULL} or {SLIDING}")
    if not all(full) and not size:
        raise ValueError(f"layer_types has {SLIDING}, and there is no sliding_window: give how many tokens a token sees there")
    if all(full) or size >= longest:
        return {"window": 0, "full_attention_every": 0}
    for every in (0, *range(2, layers + 1)):
        if full == [every > 0 and layer % every == every - 1 for layer in range(layers)]:
            return {"window": size, "full_attention_every": every}
    raise ValueError(f"layer_types has {FULL} in layers {[i for i, one in enumerate(full) if one]}: only every n-th can be taken")


def window_fields(settings: Settings) -> dict[str, Any]:
    """What `layer_windows` reads."""
    model = settings.model
    near = [model_of_layer(model, layer).window > 0 for layer in range(model.num_layers)]
    return {"sliding_window": model.window or model.max_positions, "layer_types": [SLIDING if one else FULL for one in near]}
