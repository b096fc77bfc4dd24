"""A safetensors file: a checkpoint's weights under the names of GPT's parameters, on the way out and back.

Its metadata has the run's configuration ("config") and all other values of the checkpoint ("values"), as JSON.  Tensors
go through memory one at a time.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalina.checkpoint.files import MODEL
from megalina.checkpoint.stored import Stored
from megalina.checkpoint.streaming_writer import published, write_checkpoint
from megalina.comm.slice import Box

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def to_safetensors(source: Path, file: Path, *, optimizer: bool = False) -> None:
    """Write the weights of the checkpoint `source`; with `optimizer` its state too, as exp_avg/NAME and so on.

    ValueError where the checkpoint is damaged or `file` is there already."""
    stored = Stored(source)
    names = [name for name in stored.listing if optimizer or name.startswith(MODEL)]
    # Types with large elements first, so that every tensor is aligned, as readers that map the file like it.
    names.sort(key=lambda name: (-stored.listing[name][1].itemsize, name))
    for name in names:
        if stored.listing[name][1] not in DTYPE_NAMES:
            raise ValueError(f"{source}: safetensors files can't hold {name}, which is {stored.listing[name][1]}")
    theirs = {name.removeprefix(MODEL): name for name in names}
    listing = {own: stored.listing[name] for own, name in theirs.items()}
    with published(file) as partial:
        write_file(partial, listing, _metadata(stored.values), lambda own: stored.tensor(theirs[own]))


def write_file(
    file: Path,
    listing: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file, synced to disk, of the tensors of `listing` in its order, one at a time in memory.

    KeyError for a type that such files can't hold."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, dtype) in listing.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in listing:
            out.write(raw(tensor(name)))
        out.flush()
        os.fsync(out.fileno())


def from_safetensors(file: Path, target: Path, *, files: int = 1) -> None:
    """Write the checkpoint folder `target` from a file of `to_safetensors`, with `files` tensor files.

    ValueError where the file is damaged or of another origin, or `target` is there already."""
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            values = _values(file, opened.metadata() or {})
            types = {name: dtype for dtype, name in DTYPE_NAMES.items()}
            listing, names = {}, {}
            for name in opened.keys():  # noqa: SIM118  it is no dict
                own = name if "/" in name else MODEL + name
                part = opened.get_slice(name)
                listing[own], names[own] = (tuple(part.get_shape()), types[part.get_dtype()]), name
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{file} can't be read as a safetensors file: {error}") from error

        def fetch(name: str, box: Box) -> Tensor:
            if not box.offsets:
                whole: Tensor = opened.get_tensor(names[name])
                return whole.clone()
            cut = tuple(slice(o, o + size) for o, size in zip(box.offsets, box.data.shape, strict=True))
            piece: Tensor = opened.get_slice(names[name])[cut]
            return piece.clone(memory_format=torch.contiguous_format)

        write_checkpoint(target, values, listing, fetch, files=files)


def raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _metadata(values: dict[str, Any]) -> dict[str, str]:
    rest = {key: value for key, value in values.items() if key != "config"}
    return {"format": "pt", "config": json.dumps(values.get("config")), "values": json.dumps(rest)}


def _values(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "config" not in metadata or "values" not in metadata:
        raise ValueError(f"{file} has no config and values in its metadata: only files that were made from checkpoints go back")
    try:
        values: dict[str, Any] = json.loads(metadata["values"]) | {"config": json.loads(metadata["config"])}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: config and values in its metadata are no JSON objects: {error}") from error
    return values
