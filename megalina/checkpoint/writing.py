"""The end of a checkpoint's writing: values.json and SHA256SUMS, once its tensor files are there; and what a full disk raises."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalina.checkpoint.checksums import VALUES, Sum, write_sums


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
