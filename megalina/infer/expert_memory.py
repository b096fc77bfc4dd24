"""The memory that experts take at inference: once a node for all of them, and on each device for its slots."""

from collections.abc import Mapping
from pathlib import Path

from megalina.config import InferConfig, ModelConfig
from megalina.infer.policies import Served, slots_of
from megalina.parameters import is_moe_layer

SHARE = 0.9  # of what is free


def num_expert_bytes(model: ModelConfig, dtype_bytes: int = 4) -> int:
    """Of one expert."""
    matrices = 3 if model.activation == "swiglu" else 2
    biases = (matrices - 1) * model.d_ff + model.d_model if model.bias else 0
    return (matrices * model.d_model * model.d_ff + biases) * dtype_bytes


def num_device_bytes(config: InferConfig, served: Served, model: ModelConfig, expert_bytes: int) -> int:
    """Of one device: slots of all MoE layers, and spare places."""
    slots = slots_of(config, served)
    layers = sum(is_moe_layer(model, i) for i in range(model.num_layers))
    return (layers * slots + (config.spare_experts or 2 * slots)) * expert_bytes


def check_memory(
    modes: Mapping[str, InferConfig], served: Served, model: ModelConfig, *, local_ranks: int, free_bytes: int | None
) -> None:
    """ValueError where the engines of all modes, which are there together, need more than this node has free (None: unknown)."""
    expert_bytes = num_expert_bytes(model)
    layers = sum(is_moe_layer(model, i) for i in range(model.num_layers))
    own = {name: num_device_bytes(config, served, model, expert_bytes) for name, config in modes.items()}
    wanted = layers * served.num_experts * expert_bytes + local_ranks * sum(own.values())
    if free_bytes is not None and wanted > SHARE * free_bytes:
        name = max(own, key=lambda mode: own[mode])
        raise ValueError(
            f"experts of {len(modes)} modes take {wanted / 1e9:.2f} GB on this node, {free_bytes / 1e9:.2f} GB are free; most "
            f"takes {name}, {own[name] / 1e9:.2f} GB on each of {local_ranks} devices for {slots_of(modes[name], served)} slots "
            "a layer: lower infer.slots_per_device, or choose fewer --modes"
        )


def free_memory_bytes() -> int | None:
    """What this node can still give; None where the kernel doesn't tell."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    found = [line.split() for line in path.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None
