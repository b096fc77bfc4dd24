"""The files of one checkpoint: which there are, and values.json, which has all but the tensors.  No torch."""

import json
from pathlib import Path
from typing import Any

from megalina.checkpoint.checksums import METADATA, SUMS, VALUES, read_checked

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


def read_values(path: Path) -> dict:
    """The values of a checkpoint; needs no process group.  ValueError where it isn't one."""
    values: dict = read_description(path)["values"]
    return values


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder `checkpoints`, whole or not, from the highest step down."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in RUN/checkpoints, if there is one; it may be damaged."""
    return next((path for path in newest_first(folder) if is_complete(path)), None)


def is_shape(shape: Any) -> bool:
    """Whether it is a list of numbers of 0 or more, as anything may stand in a file."""
    return isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
