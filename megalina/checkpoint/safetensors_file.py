"""A safetensors file: a checkpoint's weights under the names of GPT's parameters, on the way out and back.

Its metadata has the run's configuration ("config") and all other values of the checkpoint ("values"), as JSON.  Tensors
go through memory one at a time.
"""

import json
import os
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

_NAMES = {
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
    header: dict[str, Any] = {"__metadata__": _metadata(stored.values)}
    end = 0
    for name in names:
        shape, dtype = stored.listing[name]
        if dtype not in _NAMES:
            raise ValueError(f"{source}: safetensors files can't hold {name}, which is {dtype}")
        start, end = end, end + stored.num_bytes(name)
        header[name.removeprefix(MODEL)] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with published(file) as partial, partial.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            out.write(_raw(stored.tensor(name)))
        out.flush()
        os.fsync(out.fileno())


def from_safetensors(file: Path, target: Path, *, files: int = 1) -> None:
    """Write the checkpoint folder `target` from a file of `to_safetensors`, with `files` tensor files.

    ValueError where the file is damaged or of another origin, or `target` is there already."""
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            values = _values(file, opened.metadata() or {})
            types = {name: dtype for dtype, name in _NAMES.items()}
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


def _raw(tensor: Tensor) -> memoryview:
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
