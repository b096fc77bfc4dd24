"""The memory that experts take at inference: once a node for all of them, and on each device for its slots."""

import math
from collections.abc import Mapping
from pathlib import Path

from megalina.blocks.activation import activation_of
from megalina.config import InferConfig, ModelConfig, is_moe_layer
from megalina.serve.policies import Served, slots_of

SHARE = 0.9  # of what is free


def num_expert_bytes(model: ModelConfig, dtype_bytes: int = 4) -> int:
    """Of one expert."""
    matrices = activation_of(model).inputs + 1
    biases = (matrices - 1) * model.d_ff + model.d_model if model.bias else 0
    return (matrices * model.d_model * model.d_ff + biases) * dtype_bytes


def num_swap_bytes(config: InferConfig) -> int:
    """What experts on their way may take, on one device; 0: as much as two layers' slots."""
    return math.ceil(config.swap_mib * 2**20)  # a little is not nothing


def num_swap_experts(swap_bytes: int, slots: int, expert_bytes: int) -> int:
    """Whole experts that may be on their way within so many bytes; 0: two layers' slots.

    ValueError where the slots of one layer don't fit: they may all be fetched at once."""
    if not swap_bytes:
        return 2 * slots
    needed = slots * expert_bytes
    if swap_bytes < needed:
        raise ValueError(
            f"{swap_bytes} bytes for experts on their way: the {slots} slots of one layer may be fetched at once and take "
            f"{needed} bytes; choose infer.swap_mib={math.ceil(needed / 2**20 * 1000) / 1000:.3f} or more, or 0 for twice as much"
        )
    return swap_bytes // expert_bytes


def num_device_bytes(config: InferConfig, served: Served, model: ModelConfig, expert_bytes: int) -> int:
    """Of one device: slots of all MoE layers, and places for experts on their way.  ValueError as `num_swap_experts`."""
    slots = slots_of(config, served)
    layers = sum(is_moe_layer(model, i) for i in range(model.num_layers))
    return (layers * slots + num_swap_experts(num_swap_bytes(config), slots, expert_bytes)) * expert_bytes


def check_memory(
    modes: Mapping[str, InferConfig], served: Served, model: ModelConfig, *, local_ranks: int, free_bytes: int | None
) -> None:
    """ValueError where the engines of all modes, which are there together, need more than this node has free (None: unknown),
    and as `num_swap_experts`."""
    expert_bytes = num_expert_bytes(model)
    layers = sum(is_moe_layer(model, i) for i in range(model.num_layers))
    own = {name: num_device_bytes(config, served, model, expert_bytes) for name, config in modes.items()}
    wanted = layers * served.num_experts * expert_bytes + local_ranks * sum(own.values())
    if free_bytes is not None and wanted > SHARE * free_bytes:
        name = max(own, key=lambda mode: own[mode])
        slots = slots_of(modes[name], served)
        coming = num_swap_experts(num_swap_bytes(modes[name]), slots, expert_bytes)
        raise ValueError(
            f"experts of {len(modes)} modes take {wanted / 1e9:.2f} GB on this node, {free_bytes / 1e9:.2f} GB are free; most "
            f"takes {name}, {own[name] / 1e9:.2f} GB on each of {local_ranks} devices for {slots} slots a layer and "
            f"{coming} experts on their way ({coming * expert_bytes / 1e9:.2f} GB): lower infer.slots_per_device or "
            "infer.swap_mib, or choose fewer --modes"
        )


def check_rows(served: Served, model: ModelConfig, *, tokens: int, local_ranks: int, free_bytes: int | None) -> None:
    """ValueError where the rows of a layer, `top_k` for each of a rank's `tokens`, need more than this node has free (None:
    unknown): sent, received, computed and brought back."""
    row_bytes = 4 * model.d_model * 4
    wanted = local_ranks * tokens * served.top_k * row_bytes
    if free_bytes is not None and wanted > SHARE * free_bytes:
        raise ValueError(
            f"{tokens} tokens at a time of each of {local_ranks} ranks go to {served.top_k} of {served.num_experts} experts: "
            f"their rows take {wanted / 1e9:.2f} GB, and {free_bytes / 1e9:.2f} GB are free; lower --sequences or --length, or "
            "let tokens use fewer experts (infer.select=top_k with a model of router=dense)"
        )


def free_memory_bytes() -> int | None:
    """What this node can still give; None where the kernel doesn't tell."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    found = [line.split() for line in path.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None
