"""Planted damage: small checkpoints of one rank, and ways to spoil them."""

from pathlib import Path
from typing import Any

import torch

from megalina.checkpoint.checkpoints import Checkpoints
from megalina.checkpoint.checksums import SUMS, sum_of, write_sums
from megalina.comm.slice import Slice
from megalina.mesh import Axis, Mesh

ONE = Mesh(**{name: Axis(name) for name in ("world", "tp", "cp", "cp_tp", "ep", "counts", "edp", "dp", "copies")})
WEIGHTS = {
    "model/a": torch.arange(60, dtype=torch.float32).view(3, 4, 5) / 7,
    "model/b": torch.linspace(-1, 1, 7, dtype=torch.float64),
    "model/c": torch.tensor([[0.1, 0.2], [0.3, 1e30]]).bfloat16(),
    "model/scale": torch.tensor(11.5),
}
STATE = WEIGHTS | {f"exp_avg/{n[6:]}": torch.full_like(t, 0.25, dtype=torch.float32) for n, t in WEIGHTS.items()}
CONFIG = {"model": {"name": "small", "d_model": 5}, "router": {"kind": "topk"}, "parallel": {"tp": 1}}


def checkpoints(folder: Path, mesh: Mesh = ONE, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, mesh, **{"keep_last": 10, "keep_every": 0, "asynchronous": False, **settings})


def saved(folder: Path, step: int, tensors: dict[str, torch.Tensor] | None = None, **values: Any) -> Path:
    """FOLDER/step_... of STATE or `tensors`, by one rank."""
    parts = {name: Slice(tensor, {}) for name, tensor in (STATE if tensors is None else tensors).items()}
    all_values = {"step": step, "vocab_size": 3, "tokenizer_path": "", "config": CONFIG, **values}
    checkpoints(folder).save(step, parts, all_values)
    return folder / f"step_{step:08d}"


def flip(path: Path, place: int, bit: int = 1) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def sign(path: Path) -> None:
    """Give a checkpoint the checksums of the files that it has now, as one who plants something would."""
    write_sums(path, {p.name: sum_of(p) for p in path.iterdir() if p.name != SUMS})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
