"""A full disk fails a save on all ranks alike, and nothing else: older checkpoints stay, and the room is given back."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megalina.checkpoint import checkpoints as checkpoints_module
from megalina.checkpoint import files, tensor_files
from megalina.checkpoint.checksums import damaged
from megalina.checkpoint.files import SaveFailed, newest_first
from megalina.checkpoint.stored import read_tensors
from megalina.comm.slice import Slice
from megalina.mesh import build_mesh
from tests.checkpoint.planted import checkpoints, names
from tests.parallel.ranks import run_on_ranks

DISK_MB = 6


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def remembered(attempt: Any) -> tuple[int, str] | None:
    try:
        attempt()
    except SaveFailed as error:
        return error.rank, str(error)
    return None


def weights(value: float, elements: int = 100) -> dict[str, Slice]:
    return {"w": Slice(torch.full((elements,), value), {"ep": 0})}


# where a write can fail: (of which rank, what, in which module)
MOMENTS = {
    "folder": (0, Path, "mkdir"),
    "folder, seen by rank 1": (1, dcp.FileSystemWriter, "prepare_local_plan"),
    "tensors": (1, tensor_files._HashedFile, "write"),
    "sync": (1, tensor_files.os, "fsync"),
    "metadata": (0, dcp.FileSystemWriter, "finish"),
    "metadata's name": (0, tensor_files._HashedFiles, "rename"),
    "values": (0, checkpoints_module, "write_rest"),
    "sums": (0, files, "write_sums"),
    "name": (0, Path, "rename"),
    "folder's sync": (0, checkpoints_module, "sync_folder"),
}


def fail_everywhere(root: Path) -> dict[str, Any]:
    """At each moment in turn, between two saves that succeed."""
    mesh = build_mesh(ep=2)
    out = {}
    for asynchronous in (False, True):
        for moment, (rank, owner, name) in MOMENTS.items():
            folder = root / f"{moment} {asynchronous}"
            there = checkpoints(folder, mesh, asynchronous=asynchronous)
            there.save(1, weights(1.0), {})
            there.save(2, weights(2.0), {})
            there.wait()
            with pytest.MonkeyPatch.context() as patch:
                if mesh.world.rank == rank:
                    patch.setattr(owner, name, full)
                failed = remembered(lambda there=there: (there.save(2, weights(2.5), {}), there.wait()))
            left = there.newest()  # rank 0 has tidied up by now
            assert left is not None
            out[folder.name] = (failed, left.name, read_tensors(left)["w"].tolist()[0], damaged(left), names(folder))
            there.newest()  # both have looked
            there.save(3, weights(3.0), {})
            there.wait()
            there.newest()
            assert names(folder)[-1] == "step_00000003", names(folder)
    return out


def test_wherever_a_save_fails_all_ranks_hear_of_it_and_the_older_ones_stay(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, fail_everywhere, tmp_path)
    assert first.keys() == second.keys() and len(first) == 2 * len(MOMENTS)
    for rank in (first, second):
        for name, (failed, left, value, found, there) in rank.items():
            assert failed is not None, name
            moment = name.rpartition(" ")[0]
            assert failed[0] == MOMENTS[moment][0], name
            assert "step_00000002 could not be written: rank " in failed[1] and "No space left on device" in failed[1], name
            assert (left, value, found) == ("step_00000002", 2.0, []), name  # the older one of the same step
            assert there == ["step_00000001", "step_00000002"], name


def test_an_asynchronous_failure_comes_with_the_next_save_which_is_made_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = checkpoints(tmp_path, asynchronous=True)
    there.save(1, weights(1.0), {})
    there.wait()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_sums", full)
        there.save(2, weights(2.0), {})
        there._pending.exception()  # type: ignore[union-attr]  # the disk is full until it has ended
    with pytest.raises(SaveFailed, match="step_00000002") as caught:
        there.save(3, weights(3.0), {})
    assert caught.value.path == tmp_path / "step_00000002" and caught.value.rank == 0
    there.wait()
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_an_older_checkpoint_that_cannot_be_removed_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = checkpoints(tmp_path, keep_last=1)
    there.save(1, weights(1.0), {})
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "step_00000001":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    there.save(2, weights(2.0), {})
    assert "something old could not be removed" in caplog.text and there.newest() == tmp_path / "step_00000002"


def test_what_is_no_fault_of_the_disk_is_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "write_rest", lambda *_: {}["a bug"])  # type: ignore[index]
    with pytest.raises(RuntimeError, match="a bug") as caught:
        checkpoints(tmp_path).save(1, weights(1.0), {})
    assert not isinstance(caught.value, SaveFailed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_disk(folder: Path) -> list[Any]:
    """Three saves of 1, 8 and 1 MB, synchronous and not."""
    mesh = build_mesh(ep=2)
    out: list[Any] = []
    for asynchronous in (False, True):
        there = checkpoints(folder, mesh, asynchronous=asynchronous)
        for step, megabytes in ((1, 1), (2, 8), (3, 1)):
            parts = weights(float(step), megabytes * 250_000 // 2)
            out.append(remembered(lambda there=there, step=step, parts=parts: (there.save(step, parts, {}), there.wait())))
            out.append((there.newest().name, shutil.disk_usage(folder).used))  # type: ignore[union-attr]
            there.newest()  # before rank 0 goes on writing
        kept = [bool((read_tensors(path)["w"] == int(path.name[5:])).all()) for path in newest_first(folder)]
        out.append((kept, names(folder)))
        there.newest()
        if mesh.world.rank == 0:
            shutil.rmtree(folder)
        there.newest()
    return out


def test_a_disk_that_is_really_full_loses_one_save_and_is_not_left_full(small_disk: Path) -> None:
    for found in run_on_ranks(2, fill_disk, small_disk / "run"):
        for first, used, failed, after, third, last, kept in (found[:7], found[7:]):
            assert first is None and third is None and kept == ([True, True], ["step_00000001", "step_00000003"])
            assert failed is not None and "No space left on device" in failed[1] and "step_00000002" in failed[1]
            assert used[0] == "step_00000001" == after[0] and last[0] == "step_00000003"
            assert after[1] < used[1] + 100_000  # bytes: the room is there again
