"""A cache entry: a folder of files that is built once, whatever the number of processes and jobs that want it.

The first process to take the lock builds into a folder beside the entry and renames it; the others wait and use it.  A
reader therefore never sees half an entry, and a builder that was killed leaves nothing that looks like one.
"""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalina.whole_file import naming

Arrays = dict[str, npt.NDArray[Any]]


def cache_entry(folder: Path, build: Callable[[Path], None]) -> Path:
    """The entry at `folder`, made by `build(new_folder)` if it is not there yet.

    ValueError where the cache can't be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(folder.with_name(folder.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"the cache {folder.parent} can't be written ({error.strerror}): set data.cache_dir") from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX)  # the system frees it when its holder dies
        if folder.is_dir():
            return folder
        mark = f"{folder.name}.building-{socket.gethostname()}-"
        for leftover in folder.parent.glob(mark + "*"):  # of a builder that was killed: we hold this host's lock, so it is gone
            shutil.rmtree(leftover)
        new = Path(tempfile.mkdtemp(prefix=mark, dir=folder.parent))
        try:
            build(new)
            new.chmod(0o755)
            _publish(new, folder)
        except BaseException:
            shutil.rmtree(new)
            raise
        return folder
    finally:
        os.close(lock_fd)


def _publish(new: Path, folder: Path) -> None:
    try:
        new.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(new)  # a host whose locks this file system doesn't share was faster; the contents are the same


def cached_arrays(folder: Path, names: Sequence[str], build: Callable[[], Arrays]) -> Arrays:
    """The arrays `names`, which `build()` returns, kept as .npy files of the entry and memory-mapped.

    ValueError where a file is missing, cut off or no array.
    """

    def write(new: Path) -> None:
        for name, array in build().items():
            with naming(new / f"{name}.npy"):
                np.save(new / f"{name}.npy", array)

    entry = cache_entry(folder, write)
    return {name: _array(entry / f"{name}.npy") for name in names}


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r")  # never a pickle: numpy refuses them unless told otherwise
    except Exception as error:  # numpy stumbles over a damaged header in many ways
        raise ValueError(f"{path} is damaged ({error}): remove {path.parent}, it is made again") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is damaged (it is an archive): remove {path.parent}, it is made again")
    return array
