"""The tensor files of a checkpoint, written by many ranks or by one process tensor by tensor, hashed as they are written.

A checksum taken on the way to the disk is of what was meant, so a disk that loses it is found out.

This module takes a second of imports (sympy, DTensor): who may do without it imports it where it writes.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megalina.checkpoint.checksums import Sum
from megalina.checkpoint.files import SaveFailed
from megalina.comm.slice import Box, Part

Fetch = Callable[[str, Box], Tensor]  # the data of a box of a tensor


class _Saver(DefaultSavePlanner):
    """Plans the saving of boxes; torch's planner keeps one of several copies and checks that boxes fill each tensor."""

    def __init__(self, parts: Mapping[str, Part], fetch: Fetch | None = None) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = parts
        self._boxes = {MetadataIndex(name, box.offsets): box for name, part in parts.items() for box in part.boxes}
        self._fetch = fetch

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
        box = self._boxes[index]
        return box.data.detach() if self._fetch is None else self._fetch(index.fqn, box)


class _HashedFiles(FileSystem):
    """The sums of the files that are written through it, and the first error met: torch turns an OSError inside
    `torch.save` into an error of its own, which says nothing of the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Sum] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", mode
        with self.noting(), open(path, "wb") as file:
            hashed = _HashedFile(file, self)
            yield hashed
            file.close()  # here what is buffered may still meet a full disk
        self.sums[Path(path).name] = Sum(hashed.digest.hexdigest(), hashed.num_bytes)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)

    @contextmanager
    def noting(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            raise


class _HashedFile(io.BufferedIOBase):
    """Passes on what is written, and hashes it."""

    def __init__(self, file: io.BufferedWriter, files: _HashedFiles) -> None:
        self._file, self._files = file, files
        self.digest, self.num_bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        with self._files.noting():
            count = self._file.write(data)
        self.digest.update(data)
        self.num_bytes += count
        return count

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        if not self._file.closed:
            with self._files.noting():
                self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        with self._files.noting():
            self._file.close()


class _Writer(dcp.FileSystemWriter):
    """torch's writer.  What goes wrong leaves it as an OSError, ValueError or RuntimeError: they are sure to travel
    between ranks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)
        self.fs = self.files = _HashedFiles()

    def storage_meta(self) -> StorageMeta:
        """Without the folder's path: a checkpoint that is moved is the same one."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with self._plain():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with self._plain():
            super().finish(metadata, results)

    @contextmanager
    def _plain(self) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:
            cause = error if isinstance(error, OSError) else self.files.error
            if cause is None and type(error) in (ValueError, RuntimeError):
                raise
            if cause is None:
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            raise OSError(cause.errno, cause.strerror or str(cause), cause.filename) from error


class _Streamer(_Writer):
    """Writes one tensor after the other; torch's writer keeps all of a file in memory until it is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with self._plain(), self.fs.create_stream(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                start = file.tell()
                torch.save(planner.resolve_data(item), cast(IO[bytes], file))
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def write_tensors(
    path: Path, parts: Mapping[str, Part], group: dist.ProcessGroup | None
) -> tuple[dict[str, Any], dict[str, Sum]]:
    """Write the parts of all ranks of `group` into the folder `path`, synced to disk; returns what values.json says of
    them, and the sums of the files that this rank has written.

    On all ranks alike: SaveFailed where one can't write, RuntimeError where the parts don't make whole tensors."""
    writer = _Writer(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is meant
            metadata = dcp.save({}, storage_writer=writer, planner=_Saver(parts), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # not an Exception: nobody would catch it
        causes = {rank: cause[0] for rank, cause in error.failures.items()}
        for rank, cause in causes.items():
            if isinstance(cause, OSError):
                raise SaveFailed(path, rank, str(cause)) from error
        reasons = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
        raise RuntimeError(f"can't write checkpoint {path}: {reasons}") from error
    return _listing(metadata), writer.files.sums


def write_streamed(path: Path, shares: Sequence[Mapping[str, Part]], fetch: Fetch) -> tuple[dict[str, Any], dict[str, Sum]]:
    """As `write_tensors`, by one process: a tensor file for each of `shares`, as that many ranks would write them.

    The parts' boxes are of shapes alone (device "meta"); `fetch` gives the data of one at a time, contiguous and with
    nothing else in its storage.  OSError where the disk is full."""
    writer = _Streamer(path)
    savers = [_Saver(parts, fetch) for parts in shares]
    for saver in savers:
        saver.set_up_planner({}, storage_meta=writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    plans = [writer.prepare_local_plan(saver.create_local_plan()) for saver in savers]
    plans, metadata = savers[0].create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = []
    for saver, plan in zip(savers, plans, strict=True):
        results.append(writer.write_data(saver.finish_plan(plan), saver).wait())
    writer.finish(metadata, results)
    return _listing(metadata), writer.files.sums


def _listing(metadata: Metadata) -> dict[str, Any]:
    return {
        name: {"shape": list(entry.size), "dtype": str(entry.properties.dtype).removeprefix("torch.")}
        for name, entry in sorted(metadata.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata)
    }
