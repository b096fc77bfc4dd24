"""Cache entries: built once, whole or not at all."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megalina.data.cache import cache_entry, cached_arrays


def build_slowly(folder: Path, log: Path) -> None:
    def build(new: Path) -> None:
        with log.open("a") as out:
            out.write("built\n")
        (new / "first").write_text("1")
        time.sleep(0.3)
        (new / "second").write_text("2")

    entry = cache_entry(folder, build)
    assert sorted(path.name for path in entry.iterdir()) == ["first", "second"]


def build_for_ever(folder: Path) -> None:
    def build(new: Path) -> None:
        (new / "first").write_text("1")
        (folder.parent / "begun").touch()
        time.sleep(60)

    cache_entry(folder, build)


def test_processes_that_build_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_slowly, args=(tmp_path / "c" / "entry", tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_builder_leaves_nothing_that_looks_built(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=build_for_ever, args=(tmp_path / "entry",))
    process.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "entry").exists()
    build_slowly(tmp_path / "entry", tmp_path / "log")
    assert not list(tmp_path.glob("*.building-*"))


def test_a_build_that_raises_can_be_tried_again(tmp_path: Path) -> None:
    def fail(new: Path) -> None:
        (new / "half").touch()
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        cache_entry(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]
    build_slowly(tmp_path / "entry", tmp_path / "log")


def test_arrays_are_built_once_and_mapped(tmp_path: Path) -> None:
    calls = []
    for _ in range(2):
        arrays = cached_arrays(tmp_path / "entry", ["a"], lambda: calls.append(1) or {"a": np.arange(5)})  # type: ignore[func-returns-value]
        assert isinstance(arrays["a"], np.memmap) and arrays["a"].tolist() == [0, 1, 2, 3, 4]
    assert len(calls) == 1


def test_a_cache_that_can_not_be_written_says_which_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="set data.cache_dir"):
        cache_entry(tmp_path / "file" / "entry", lambda new: None)
