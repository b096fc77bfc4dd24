"""The inspection of a checkpoint: what is in it, for people and as JSON, without reading a tensor; and whether it is whole.

Whole is one whose files are all as they were written, with every tensor covered once by its boxes and every value finite.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megalina.checkpoint.checksums import METADATA, SUMS, damaged, read_sums
from megalina.checkpoint.files import MODEL
from megalina.checkpoint.stored import Stored

LEDGER_LINES = 3
NUMBERS = ("step", "tokens", "consumed_samples", "optimizer_steps", "skipped_steps", "rewinds", "val_loss", "vocab_size")
CONFIG = {
    "model": "num_layers d_model num_heads num_kv_heads d_ff num_experts",
    "router": "kind top_k capacity_factor balance_loss z_loss bias_update_rate",
    "train": "steps global_batch_size micro_batch_size seq_len dtype seed",
    "optim": "name lr weight_decay clip_norm",
    "data": "kind prefix",
}


def summary(path: Path) -> dict[str, Any]:
    """What the checkpoint folder `path` holds; sizes in bytes.  ValueError where it isn't one, or what is read is damaged."""
    stored = Stored(path)
    values = stored.values
    tensors = [
        {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "num_bytes": stored.num_bytes(name)}
        for name, (shape, dtype) in sorted(stored.listing.items())
    ]
    groups: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        group = groups.setdefault(tensor["name"].partition("/")[0], {"tensors": 0, "elements": 0, "num_bytes": 0})
        group["tensors"] += 1
        group["elements"] += math.prod(tensor["shape"])
        group["num_bytes"] += tensor["num_bytes"]
    files = {name: entry.num_bytes for name, entry in read_sums(path).items()}
    files[SUMS] = (path / SUMS).stat().st_size
    config = values.get("config", {})
    return {
        "path": str(path),
        **{key: values.get(key) for key in NUMBERS},
        "layout": {
            **config.get("parallel", {}),
            **{key: value for key, value in values.get("arithmetic", {}).items() if key in ("mesh", "device", "torch")},
            "tensor_files": sum(name.endswith(".distcp") for name in files),
        },
        "config": config,
        "weights": groups.pop(MODEL.rstrip("/"), {"tensors": 0, "elements": 0, "num_bytes": 0}),
        "optimizer": groups,
        "tensors": tensors,
        "ledger": values.get("ledger", [])[-LEDGER_LINES:],
        "files": files,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The summary for people; of the tensors only the weights, since optimizer state has their shapes."""
    lines = [found["path"]]
    lines += [f"  {key:<17}{found[key]}" for key in NUMBERS if found[key] is not None]
    lines.append("  layout           " + _pairs(found["layout"], found["layout"]) + " (any layout loads it)")
    for group, keys in CONFIG.items():
        settings = found["config"].get(group, {})
        if settings:
            lines.append(f"  {group:<17}" + _pairs(settings, [key for key in keys.split() if key in settings]))
    for name, group in {"weights": found["weights"], **found["optimizer"]}.items():
        lines.append(f"  {name:<17}{group['tensors']} tensors, {group['elements']:,} elements, {_size(group['num_bytes'])}")
    weights = [t for t in found["tensors"] if t["name"].startswith(MODEL)] or found["tensors"]
    width = max((len(t["name"]) for t in weights), default=0)
    lines.append("  tensors")
    for tensor in weights:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        lines.append(f"    {tensor['name']:<{width}}  {shape:>20}  {tensor['dtype']:<9}{_size(tensor['num_bytes']):>12}")
    if found["ledger"]:
        lines.append("  ledger, last steps")
        lines += [f"    {_pairs(line, line)}" for line in found["ledger"]]
    lines.append("  files")
    lines += [f"    {name:<{width}}  {_size(num_bytes):>12}" for name, num_bytes in sorted(found["files"].items())]
    return "\n".join(lines)


def _pairs(values: Mapping[str, Any], keys: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(f"{key} {values[key]}" for key in keys)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} B"


def faults(path: Path) -> list[str]:
    """What is wrong with the checkpoint folder `path`, a line each; reads everything, one tensor at a time."""
    found = [f"{path}/{line}" for line in damaged(path)]
    if found:
        return found
    try:
        stored = Stored(path, checked=True)
    except ValueError as error:
        return [str(error)]
    unlisted = sorted({info.relative_path for info in stored.metadata.storage_data.values()} - set(read_sums(path)))
    found += [f"{path / name} has no checksum" for name in unlisted]
    extra = sorted(set(stored.metadata.state_dict_metadata) - set(stored.listing))
    found += [f"{path / METADATA}: tensor {name} is not in values.json" for name in extra]
    for name in stored.listing:
        try:
            fault = _fault(stored, name)
        except ValueError as error:
            fault = str(error)
        if fault:
            found.append(f"{path}: tensor {name}: {fault}")
    return found


def _fault(stored: Stored, name: str) -> str:
    shape, dtype = stored.listing[name]
    value = stored.tensor(name)
    times = torch.zeros(shape, dtype=torch.uint8)
    for chunk in stored.chunks(name):
        if any(o + size > n for o, size, n in zip(chunk.offsets, chunk.sizes, shape)):
            return f"its box {_text(chunk)} is beyond its shape {list(shape)}"
        box = times[tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes))]
        if bool((box > 0).any()):
            return f"its box {_text(chunk)} covers what another one covers"
        box.fill_(1)
    missing = times.numel() - int(times.sum(dtype=torch.int64))
    if missing:
        return f"{missing} of {times.numel()} elements are in no box"
    if dtype.is_floating_point and (bad := int((~torch.isfinite(value)).sum())):
        return f"{bad} of {value.numel()} values are not finite"
    return ""


def _text(chunk: ChunkStorageMetadata) -> str:
    return f"{list(chunk.offsets)} + {list(chunk.sizes)}"
