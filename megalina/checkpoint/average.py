"""The average of checkpoints: the mean of the weights of one model after several steps or runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megalina.checkpoint.checkpoints import check_same
from megalina.checkpoint.files import MODEL
from megalina.checkpoint.hugging_face.carried import carry_from
from megalina.checkpoint.stored import Stored
from megalina.checkpoint.streaming_writer import write_checkpoint
from megalina.comm.slice import Box

KEPT = ("config", "vocab_size", "tokenizer_path")
SAME = ("model", "router")  # groups of the configuration that make the model


def average(sources: Sequence[Path], target: Path, *, weights: Sequence[float] | None = None, files: int = 1) -> None:
    """Write the checkpoint `target`: each weight is the mean over `sources`, summed in float64, in its type in the first;
    without optimizer state, and with the first one's configuration.  `weights` (default: equal) must sum to 1.

    ValueError where the checkpoints are not of one model, or damaged, or the weights don't fit."""
    if not sources:
        raise ValueError("there is no checkpoint to average")
    shares = [1 / len(sources)] * len(sources) if weights is None else list(weights)
    if len(shares) != len(sources):
        raise ValueError(f"{len(shares)} weights for {len(sources)} checkpoints: give one for each")
    if not abs(sum(shares) - 1) < 1e-6:
        raise ValueError(f"the weights sum to {sum(shares):g}: they must sum to 1")
    stored = [Stored(path) for path in sources]
    first, others = stored[0], stored[1:]
    listing = {name: entry for name, entry in first.listing.items() if name.startswith(MODEL)}
    if not listing:
        raise ValueError(f"checkpoint {first.path} has no weights")
    shapes = {name: shape for name, (shape, _) in listing.items()}
    for other in others:
        check_same(other.path, {n: shape for n, (shape, _) in other.listing.items() if n.startswith(MODEL)}, shapes)
        for group in SAME:
            here, there = (_settings(one, group) for one in (first, other))
            different = [key for key in here if here[key] != there.get(key) and key != "name"]
            if different:
                key = different[0]
                raise ValueError(
                    f"{other.path} is of another model than {first.path}: {group}.{key}={there.get(key)}, not {here[key]}"
                )

    def fetch(name: str, box: Box) -> torch.Tensor:
        total = torch.zeros(box.data.shape, dtype=torch.float64)
        for one, share in zip(stored, shares):
            total.add_(one.box(name, box.offsets, tuple(box.data.shape), torch.float64), alpha=share)
        return total.to(box.data.dtype)

    values: dict[str, Any] = {key: first.values[key] for key in KEPT if key in first.values}
    steps = [one.values["step"] for one in stored]
    values |= {"step": max(steps), "averaged_steps": steps, "averaged_weights": shares}
    write_checkpoint(target, values, listing, fetch, files=files, beside=carry_from(first.path))


def _settings(stored: Stored, group: str) -> dict[str, object]:
    settings: dict[str, object] = stored.values.get("config", {}).get(group, {})
    return settings
