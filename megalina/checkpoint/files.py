"""The files of one checkpoint: which there are, and values.json, which has all but the tensors; the end of its writing, once the
tensor files are there, and what a full disk raises.  No torch."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalina.checkpoint.checksums import METADATA, SUMS, VALUES, Sum, read_checked, write_sums

MODEL = "model/"  # before the names of weights and router biases; optimizer state has "exp_avg/", "master/" ...


def is_complete(path: Path) -> bool:
    """Whether all is there that is written last; says nothing of damage."""
    return all((path / name).is_file() for name in (VALUES, METADATA, SUMS))


def read_description(path: Path) -> dict[str, Any]:
    """values.json: {"values": .., "tensors": {name: {"shape": .., "dtype": ..}}}; ValueError where there is none, or it
    is damaged."""
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}: give the folder of one, such as RUN/checkpoints/step_00000020")
    for name in (VALUES, METADATA, SUMS):
        if not (path / name).is_file():
            if (path / "config.json").is_file():
                raise ValueError(
                    f"{path} is in Hugging Face's format: first, python tools/checkpoint.py import {path} CHECKPOINT"
                )
            raise ValueError(f"{path} is not a complete checkpoint: it has no {name}")
    data = read_checked(path, VALUES)
    try:
        description: dict[str, Any] = json.loads(data)
        good = isinstance(description["values"], dict)
        for tensor in description["tensors"].values():
            good = good and isinstance(tensor["dtype"], str) and is_shape(tensor["shape"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / VALUES} is damaged: {type(error).__name__} {error}") from error
    if not good:
        raise ValueError(f"{path / VALUES} is damaged: it has no values, or a tensor without shape and dtype")
    return description


def left_out(values: Mapping[str, Any]) -> str:
    """What of the model of a checkpoint with these values is not loaded where it is served, in one line; "" where all is."""
    layers = values["config"]["model"].get("mtp_layers", 0)
    return f"{layers} layers of multi-token prediction are left out: they serve training alone" if layers else ""


def read_values(path: Path) -> dict:
    """The values of a checkpoint; needs no process group.  ValueError where it isn't one."""
    values: dict = read_description(path)["values"]
    config = values.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if isinstance(model, dict) and isinstance(model.get("qk_norm"), bool):  # as it was before there were several
        model["qk_norm"] = "head" if model["qk_norm"] else "none"
    return values


def tokenizer_path(path: Path, values: Mapping[str, Any]) -> str:
    """Where the tokenizer of the checkpoint `path` is: in its folder, or where it was when the checkpoint was written; "" where
    the data had none."""
    named: str = values["tokenizer_path"]
    return str(path / named) if named and (path / named).is_file() else named


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder `checkpoints`, whole or not, from the highest step down."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in RUN/checkpoints, if there is one; it may be damaged."""
    return next((path for path in newest_first(folder) if is_complete(path)), None)


def is_shape(shape: Any) -> bool:
    """Whether it is a list of numbers of 0 or more, as anything may stand in a file."""
    return isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, because of the disk: all ranks raise it alike; older checkpoints are untouched."""

    def __init__(self, path: Path, rank: int, reason: str) -> None:
        super().__init__(f"checkpoint {path} could not be written: rank {rank}: {reason}")
        self.path, self.rank, self.reason = path, rank, reason


def write_rest(path: Path, values_json: str, tensors: Mapping[str, Any], sums: Mapping[str, Sum]) -> None:
    """Write values.json, then SHA256SUMS from `sums` of all other files, and make the whole folder durable."""
    data = json.dumps({"values": json.loads(values_json), "tensors": tensors}, indent=1).encode()
    with (path / VALUES).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    write_sums(path, {**sums, VALUES: Sum(hashlib.sha256(data).hexdigest(), len(data))})
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make names in a folder durable: a file's own sync doesn't cover its entry."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
