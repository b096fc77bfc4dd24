"""The profile of a checkpoint: a routing trace of a sample of tokens, from which serving foresees where tokens will go.

It lies beside the checkpoint's own files as routing.npz and is no part of the checkpoint: a checkpoint without one is whole, and
SHA256SUMS doesn't name it (an npz has checksums of its own), so one can be recorded, or recorded anew, at any time.
"""

from pathlib import Path

from megalina.checkpoint.files import read_values
from megalina.config import ModelConfig, is_moe_layer
from megalina.placement.routing_trace import RoutingTrace, read_trace

PROFILE = "routing.npz"


def find_profile(checkpoint: Path) -> RoutingTrace | None:
    """The profile in the folder `checkpoint`, None where there is none.

    ValueError, with both paths, for one that is damaged or of another model, and for a folder that holds no checkpoint."""
    values, path = read_values(checkpoint), checkpoint / PROFILE
    if not path.exists():
        return None
    try:
        trace = read_trace(path)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
    check_profile(path, trace, ModelConfig(**values["config"]["model"]), top_k=values["config"]["router"]["top_k"])
    return trace


def check_profile(path: Path, trace: RoutingTrace, model: ModelConfig, *, top_k: int) -> None:
    """ValueError where the trace, which was read from `path`, is not of this model: experts, choices a token, MoE layers."""
    layers = [layer for layer in range(model.num_layers) if is_moe_layer(model, layer)]
    pairs = (
        ("experts", trace.num_experts, model.num_experts),
        ("choices a token", trace.top_k, top_k),
        ("MoE layers", list(trace.layers), layers),
    )
    different = [f"{what}: {there} there, {here} in the model" for what, there, here in pairs if there != here]
    if different:
        raise ValueError(
            f"{path} is the profile of another model ({'; '.join(different)}): remove it, or record one with "
            "tools/record_routing.py"
        )
