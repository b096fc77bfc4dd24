"""Errors of writing have the name of their file, in the pipeline of data too."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalina.data.cache import cached_arrays
from megalina.data.indexed import IndexedDataset, IndexedWriter, Manifest
from megalina.whole_file import naming


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_gets_the_name_and_one_with_a_name_keeps_it() -> None:
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: 'a/b'$"), naming(Path("a/b")):
        full()
    with pytest.raises(OSError, match="'c'"), naming("a"):
        raise OSError(errno.ENOSPC, "No space left on device", "c")
    with pytest.raises(KeyError), naming("a"):
        {}["x"]  # type: ignore[index]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("documents", [2, 30, 40_000])
def test_a_dataset_on_a_full_disk_is_named_and_leaves_nothing(small_disk: Path, documents: int) -> None:
    """Of long documents the tokens are too many, of short ones the index is."""
    length = 1 if documents > 1000 else 8192 if documents > 10 else 80_000
    said = f"No space left on device: '{small_disk}/new.(bin|idx)'"
    with pytest.raises(OSError, match=said), IndexedWriter(small_disk / "new", np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(np.zeros(length, np.uint16))
    assert list(small_disk.iterdir()) == []


def test_a_dataset_is_the_same_bytes_as_before(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(np.arange(6), np.array([1, 2, 3]))
        writer.add_document([7, 8], [1, 1])
    lengths, pointers, documents = [1, 2, 3, 1, 1], [0, 2, 6, 12, 14], [0, 1, 2, 3, 5]
    wanted = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([8]) + (5).to_bytes(8, "little") + (5).to_bytes(8, "little")
    wanted += np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(documents, "<i8").tobytes()
    assert (tmp_path / "a.idx").read_bytes() == wanted
    assert IndexedDataset(tmp_path / "a").num_tokens == 8


def test_manifest_and_cache_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device: 'corpus.json'"):
        Manifest("t", "0", 1, 1, 1).write("corpus")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left on device: '.*/order.npy'"):
        cached_arrays(tmp_path / "entry", ["order"], lambda: {"order": np.arange(3)})
