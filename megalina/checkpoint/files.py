"""The files of one checkpoint: tensors in the format of torch.distributed.checkpoint, everything else in values.json.

`.metadata` says which box of which tensor is where in the `*.distcp` files.  It is a pickle, as torch defines the
format; only the types that torch's writer puts there are accepted when it is read.  Tensors are read with torch's
`weights_only` unpickler.
"""

import dataclasses
import json
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megalina.checkpoint.slice import Box

VALUES = "values.json"
_METADATA = ".metadata"


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one tensor: where it is saved from or loaded into."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    boxes: list[Box]


class _Saver(DefaultSavePlanner):
    """Plans the saving of boxes; torch's planner keeps one of several copies and checks that boxes fill each tensor."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = parts
        self._data = {MetadataIndex(name, box.offsets): box.data for name, part in parts.items() for box in part.boxes}

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, part in self._parts.items():
            for box in part.boxes:
                chunk = ChunkStorageMetadata(torch.Size(box.offsets), box.data.size())
                data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=part.dtype), size=torch.Size(part.shape))
                items.append(WriteItem(MetadataIndex(name, box.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._data[index].detach()


class _Loader(DefaultLoadPlanner):
    """Says where each piece that is read belongs."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._data = {MetadataIndex(name, box.offsets): box.data for name, part in parts.items() for box in part.boxes}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._data[index].detach()


class _RestrictedUnpickler(pickle.Unpickler):
    _ALLOWED = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},  # their home in Python 3.13
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in self._ALLOWED.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata: Metadata = _RestrictedUnpickler(file).load()
        return metadata


def write_tensors(path: Path, parts: Mapping[str, Part], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Write the parts of all ranks of `group` into the folder `path`, synced to disk; returns what values.json says of
    them.  RuntimeError on all ranks alike where one can't write, or where the parts don't make whole tensors."""
    writer = dcp.FileSystemWriter(path, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is meant
            metadata = dcp.save({}, storage_writer=writer, planner=_Saver(parts), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # not an Exception: nobody would catch it
        reasons = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise RuntimeError(f"can't write checkpoint {path}: {reasons}") from error
    return {
        name: {"shape": list(entry.size), "dtype": str(entry.properties.dtype).removeprefix("torch.")}
        for name, entry in sorted(metadata.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata)
    }


def write_values(path: Path, values_json: str, tensors: Mapping[str, Any]) -> None:
    """Write values.json and make the whole folder durable."""
    with (path / VALUES).open("w") as file:
        json.dump({"values": json.loads(values_json), "tensors": tensors}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make names in a folder durable: a file's own sync doesn't cover its entry."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_complete(path: Path) -> bool:
    return (path / VALUES).is_file() and (path / _METADATA).is_file()


def read_description(path: Path) -> dict[str, Any]:
    """values.json: {"values": .., "tensors": {name: {"shape": .., "dtype": ..}}}; ValueError where there is none."""
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}: give the folder of one, such as RUN/checkpoints/step_00000020")
    if not is_complete(path):
        missing = VALUES if not (path / VALUES).is_file() else _METADATA
        raise ValueError(f"{path} is not a complete checkpoint: it has no {missing}")
    try:
        description: dict[str, Any] = json.loads((path / VALUES).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / VALUES} is damaged: {error}") from error
    return description


def read_into(path: Path, parts: Mapping[str, Part]) -> None:
    """Fill the boxes of `parts` from the checkpoint, converting types; their names and shapes must be the checkpoint's.

    Each process reads what it needs, without talking to others.  ValueError, before anything is changed, where files
    are damaged or missing."""
    reader = _Reader(path)
    try:
        metadata = reader.read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"{path / _METADATA} is damaged: {error}") from error
    items: list[ReadItem] = []
    for name, part in parts.items():
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{path / _METADATA} is damaged: {VALUES} names tensor {name}, and it does not")
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), box.data.size()) for box in part.boxes]
        items += create_read_items_for_chunk_list(name, entry, chunks)
    _check_sizes(path, [metadata.storage_data[item.storage_index] for item in items])
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(LoadPlan(items), _Loader(parts)).wait()


def _check_sizes(path: Path, needed: Iterable[Any]) -> None:
    ends: dict[str, int] = {}
    for info in needed:
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size < end:
            raise ValueError(f"{path / name} is damaged: it has {size} bytes and should have at least {end}")
