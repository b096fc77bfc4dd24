"""A stored checkpoint, read: tensors in the format of torch.distributed.checkpoint, all else in values.json.

`.metadata` says which box of which tensor is where in the `*.distcp` files.  It is a pickle, as torch defines the
format; only the types that torch's writer puts there are accepted when it is read.  Tensors are read with torch's
`weights_only` unpickler.  No file is read before its checksum was found right.

This module takes a second of imports (sympy, DTensor): who may do without it imports it where it reads.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megalina.checkpoint.checksums import METADATA, VALUES, check_files, check_inside, read_checked, read_sums
from megalina.checkpoint.files import is_complete, is_shape, read_description
from megalina.checkpoint.metadata_pickle import read_pickle
from megalina.comm.slice import Box, Part


class _Loader(DefaultLoadPlanner):
    """Says where each piece that is read belongs."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._data = {MetadataIndex(name, box.offsets): box.data for name, part in parts.items() for box in part.boxes}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._data[index].detach()


class Stored:
    """The tensors of a complete checkpoint folder, read piece by piece; needs no process group.

    Each file is checked against its checksum before the first tensor is taken from it, unless `checked` says that this
    has been done.  ValueError where files are damaged or contradict each other, before anything is changed."""

    def __init__(self, path: Path, *, checked: bool = False) -> None:
        self.path = path
        self._checked = set(read_sums(path)) if checked and is_complete(path) else set()
        description = read_description(path)
        self.values: dict[str, Any] = description["values"]
        self.metadata = read_metadata(path)
        self.listing = {n: (tuple(t["shape"]), _dtype(path, n, t["dtype"])) for n, t in description["tensors"].items()}
        for name in self.listing:
            try:
                self._check_entry(name)
            except (AttributeError, TypeError) as error:  # what is there is no entry, or lacks a part
                raise ValueError(f"{path / METADATA} is damaged: the entry of tensor {name}: {error}") from error

    def num_bytes(self, name: str) -> int:
        shape, dtype = self.listing[name]
        return math.prod(shape) * dtype.itemsize

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        shape, dtype = self.listing[name]
        return self.box(name, (0,) * len(shape), shape, dtype)

    def box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A box of a tensor, converted to `dtype`, on the CPU."""
        stored = sum(self.info(name, chunk).length for chunk in self.chunks(name))
        if self.num_bytes(name) > stored:  # before memory is taken for it
            raise ValueError(f"{self.path} is damaged: {stored} bytes can't hold tensor {name} {list(self.listing[name][0])}")
        out = torch.empty(sizes, dtype=dtype)
        self.read_into({name: Part(self.listing[name][0], dtype, [Box(offsets, out)])})
        return out

    def chunks(self, name: str) -> list[ChunkStorageMetadata]:
        """The boxes in which a tensor is stored."""
        entry = self.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.chunks

    def info(self, name: str, chunk: ChunkStorageMetadata) -> Any:
        """Where a box is stored: relative_path, offset and length in bytes."""
        return self._at(MetadataIndex(name, chunk.offsets))

    def read_into(self, parts: Mapping[str, Part]) -> None:
        """Fill the boxes of `parts`, converting types; their names and shapes must be the checkpoint's."""
        items: list[ReadItem] = []
        for name, part in parts.items():
            if self.listing.get(name, ((), None))[0] != part.shape or name not in self.listing:
                raise ValueError(f"checkpoint {self.path} has no tensor {name} {list(part.shape)}")
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [ChunkStorageMetadata(torch.Size(box.offsets), box.data.size()) for box in part.boxes]
            found = create_read_items_for_chunk_list(name, entry, chunks)
            wanted, there = sum(box.data.numel() for box in part.boxes), sum(math.prod(item.lengths) for item in found)
            if wanted != there:
                raise ValueError(f"{self.path / METADATA} is damaged: of {wanted} elements of tensor {name} it has {there}")
            items += found
        self._check([self._at(item.storage_index) for item in items])
        reader = dcp.FileSystemReader(self.path)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        try:
            reader.read_data(LoadPlan(items), _Loader(parts)).wait()
        except Exception as error:  # torch stumbles over a damaged file in many ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"a tensor file of {self.path} is damaged: {reason}") from error

    def _check_entry(self, name: str) -> None:
        path, (shape, dtype) = self.path, self.listing[name]
        entry = self.metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{path / METADATA} is damaged: {VALUES} names tensor {name}, and it does not")
        if tuple(entry.size) != shape or entry.properties.dtype != dtype:
            there, here = f"{list(entry.size)} {entry.properties.dtype}", f"{list(shape)} {dtype}"
            raise ValueError(f"{path / METADATA} is damaged: tensor {name} is {there} there and {here} in {VALUES}")
        if not all(is_shape(list(cut)) and len(cut) == len(shape) for c in entry.chunks for cut in (c.offsets, c.sizes)):
            raise ValueError(f"{path / METADATA} is damaged: tensor {name} has boxes that are none")

    def _at(self, index: MetadataIndex) -> Any:
        info = self.metadata.storage_data.get(index)
        if info is None:
            raise ValueError(f"{self.path / METADATA} is damaged: it doesn't say where {index.fqn} {list(index.offset or ())} is")
        return info

    def _check(self, needed: Iterable[Any]) -> None:
        ends: dict[str, int] = {}
        for info in needed:
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name in ends:
            check_inside(self.path, name, str(self.path / METADATA))
        check_files(self.path, sorted(set(ends) - self._checked))
        self._checked |= set(ends)
        for name, end in sorted(ends.items()):
            size = (self.path / name).stat().st_size
            if size < end:
                raise ValueError(f"{self.path / name} is damaged: it has {size} bytes and should have at least {end}")


def read_metadata(path: Path) -> Metadata:
    """`.metadata`, checked; ValueError where it is damaged, holds what has no place in it, or names files outside."""
    file = path / METADATA
    data = read_checked(path, METADATA)
    try:
        metadata = read_pickle(data)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "storage_data", None), dict):
        raise ValueError(f"{file} is damaged: it is not the metadata of a checkpoint")
    names = set()
    for info in metadata.storage_data.values():
        where = [getattr(info, key, None) for key in ("offset", "length")]
        if not isinstance(getattr(info, "relative_path", None), str) or not is_shape(where):
            raise ValueError(f"{file} is damaged: it has no file, offset and length for a tensor")
        names.add(info.relative_path)
    for name in sorted(names):
        check_inside(path, name, str(file))
    return metadata


def read_into(path: Path, parts: Mapping[str, Part], *, checked: bool = False) -> None:
    """Fill the boxes of `parts` from the checkpoint, converting types; their names and shapes must be the checkpoint's.

    Each process reads what it needs, without talking to others, and checks the files that it reads from, unless they
    are `checked`.  ValueError, before anything is changed, where files are damaged or missing."""
    Stored(path, checked=checked).read_into(parts)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, all or those of `names`, on the CPU; needs no process group.

    ValueError where there is no such tensor, or a file that is read is damaged."""
    stored = Stored(path)
    wanted = list(stored.listing) if names is None else list(names)
    missing = [name for name in wanted if name not in stored.listing]
    if missing:
        raise ValueError(f"checkpoint {path} has no tensor {missing[0]} ({len(missing)} of {len(wanted)} are missing)")
    return {name: stored.tensor(name) for name in wanted}


def _dtype(path: Path, tensor: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path / VALUES} is damaged: tensor {tensor} has the dtype {name!r}")
    return dtype
