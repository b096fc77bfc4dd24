"""The wholeness of a checkpoint: every file as it was written, every tensor covered once by its boxes, every value finite."""

from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megalina.checkpoint.checksums import METADATA, damaged, read_sums
from megalina.checkpoint.stored import Stored


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
