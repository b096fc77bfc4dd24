"""Which layers are MoE where `decoder_sparse_step` and `mlp_only_layers` say it, and their experts: what the Qwen models have in
common."""

from typing import Any

from megalina.families.family import Settings
from megalina.families.fields import Fields


def sparse_settings(fields: Fields, *, experts: int, d_ff: int) -> dict[str, Any]:
    """The numbers: where config.json has none."""
    experts = fields.whole("num_experts", experts, also="num_local_experts")
    return {
        "num_experts": max(experts, 1),
        "d_ff": fields.whole("moe_intermediate_size", d_ff),
        "dense_d_ff": fields.whole("intermediate_size"),
        **_layers(fields, experts),
    }


def sparse_fields(settings: Settings) -> dict[str, Any]:
    """What `sparse_settings` reads."""
    model = settings.model
    numbers = {
        "num_experts": model.num_experts,
        "moe_intermediate_size": model.d_ff,
        "intermediate_size": settings.dense_d_ff,
    }
    if model.dense_layers_first % model.moe_every == 0 and settings.moe == [
        (layer + 1) % model.moe_every == 0 for layer in range(model.num_layers)
    ]:
        return numbers | {"decoder_sparse_step": model.moe_every, "mlp_only_layers": []}
    dense = [layer for layer, moe in enumerate(settings.moe) if not moe]
    return numbers | {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _layers(fields: Fields, experts: int) -> dict[str, int]:
    """`dense_layers_first` and `moe_every`.  ValueError for an order of dense and MoE layers that these two can't say."""
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
