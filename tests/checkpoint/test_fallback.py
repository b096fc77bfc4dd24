"""A damaged checkpoint is named and passed over by all ranks alike; it never counts again, and never without a word."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.checksums import SUMS
from megalina.checkpoint.files import newest_first
from megalina.checkpoint.stored import read_tensors
from megalina.comm.slice import Slice
from megalina.mesh import build_mesh
from tests.checkpoint.planted import WEIGHTS, checkpoints, flip, names, saved
from tests.parallel.ranks import run_on_ranks


def empty() -> dict[str, Slice]:
    return {name: Slice(torch.zeros_like(tensor), {}) for name, tensor in WEIGHTS.items()}


def test_the_newest_good_one_is_taken_and_the_damaged_are_named_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30, 40):
        saved(tmp_path, step)
    flip(tmp_path / "step_00000040" / "__0_0.distcp", 300)
    (tmp_path / "step_00000030" / "values.json").unlink()
    there = checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, "megalina"):
        assert there.first_good(newest_first(tmp_path)) == tmp_path / "step_00000020"
    folder = str(tmp_path)
    assert [record.getMessage() for record in caplog.records if record.name == "megalina"] == [
        f"checkpoint {folder}/step_00000040 is damaged and passed over for step_00000020: "
        "__0_0.distcp: its checksum is not the one in SHA256SUMS",
        f"checkpoint {folder}/step_00000030 is damaged and passed over for step_00000020: values.json: there is no such file",
    ]
    assert names(tmp_path) == ["step_00000010", "step_00000020", "step_00000030.damaged", "step_00000040.damaged"]
    assert there.newest() == tmp_path / "step_00000020"
    saved(tmp_path, 40)
    flip(tmp_path / "step_00000040" / SUMS, 3)
    assert there.first_good(newest_first(tmp_path)) == tmp_path / "step_00000020"
    assert "step_00000040.damaged_" in names(tmp_path)  # the second of that step


def test_where_all_are_damaged_each_is_named_and_none_is_moved(tmp_path: Path) -> None:
    for step in (10, 20):
        flip(saved(tmp_path, step) / "__0_0.distcp", 300)
    with pytest.raises(ValueError, match=r"all 2 checkpoints are damaged.*step_00000020: __0_0.*step_00000010: __0_0"):
        checkpoints(tmp_path).first_good(newest_first(tmp_path))
    assert names(tmp_path) == ["step_00000010", "step_00000020"]
    assert checkpoints(tmp_path).first_good([]) is None


def test_a_damaged_one_that_cannot_be_renamed_evicts_no_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        saved(tmp_path, step)
    flip(tmp_path / "step_00000020" / "__0_0.distcp", 300)
    there = checkpoints(tmp_path, keep_last=2)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target.name.endswith(".damaged"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    assert there.first_good(newest_first(tmp_path)) == tmp_path / "step_00000010"
    assert "it could not be renamed to step_00000020.damaged" in caplog.text
    there.save(15, {"w": Slice(torch.ones(3), {})}, {})
    assert names(tmp_path) == ["step_00000010", "step_00000015", "step_00000020"]
    there.save(20, {"w": Slice(torch.ones(3), {})}, {})  # and a good one takes its place
    assert names(tmp_path) == ["step_00000015", "step_00000020"] and len(read_tensors(tmp_path / "step_00000020")) == 1


def test_a_named_checkpoint_that_is_damaged_is_an_error_before_anything_is_changed(tmp_path: Path) -> None:
    path = saved(tmp_path, 10, WEIGHTS)
    flip(path / "__0_0.distcp", 300)
    mine = empty()
    with pytest.raises(ValueError, match=r"step_00000010: __0_0.distcp: its checksum.*choose another one"):
        checkpoints(tmp_path / "other").load(path, mine)
    assert not any(bool(part.local.any()) for part in mine.values())


def test_damage_after_the_check_and_a_second_load_is_found(tmp_path: Path) -> None:
    """What `first_good` has found is good for one load."""
    path = saved(tmp_path, 10, WEIGHTS)
    there = checkpoints(tmp_path)
    assert there.first_good([path]) == path
    there.load(path, empty())
    flip(path / "__0_0.distcp", 300)
    with pytest.raises(ValueError, match="its checksum"):
        there.load(path, empty())


def decide(folder: Path) -> dict[str, Any]:
    """Two ranks; damage is planted in a file of rank 1's share alone, and seen by neither in another."""
    mesh = build_mesh(ep=2)
    there = checkpoints(folder, mesh)
    parts = {"w": Slice(torch.full((4, 2), float(mesh.world.rank)), {"ep": 0})}
    for step in (10, 20):
        there.save(step, parts, {"step": step})
    if mesh.world.rank == 0:
        flip(folder / "step_00000020" / "__1_0.distcp", 200)
    caught = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megalina").addHandler(handler)
    found: list[Path] = newest_first(folder) if mesh.world.rank == 0 else []  # rank 0 decides which there are
    good = there.first_good(found)
    assert good is not None
    mine = Slice(torch.zeros(8, 2), {})
    there.load(good, {"w": mine})
    flips = folder / "step_00000010" / "__0_0.distcp"
    there.newest()  # both have loaded it
    if mesh.world.rank == 0:
        flip(flips, 200)
    there.newest()
    try:
        there.load(good, {"w": mine})
        error = ""
    except ValueError as raised:
        error = str(raised)
    return {"good": good.name, "warnings": caught, "w": mine.local[:, 0].tolist(), "error": error}


def test_ranks_share_the_reading_and_agree(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, decide, tmp_path / "run")
    for rank in (first, second):
        assert rank["good"] == "step_00000010" and rank["w"] == [0.0] * 4 + [1.0] * 4
        assert "step_00000010: __0_0.distcp: its checksum is not the one in SHA256SUMS" in rank["error"]
    assert len(first["warnings"]) == 1 and "__1_0.distcp: its checksum" in first["warnings"][0] and not second["warnings"]
    assert names(tmp_path / "run") == ["step_00000010", "step_00000020.damaged"]
