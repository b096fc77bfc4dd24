"""A file is replaced as a whole or not at all, and nothing is left beside it."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from megalina.whole_file import whole, write_whole


def test_readers_see_the_old_file_until_the_new_one_is_all_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")
    with whole(path, durable=True) as aside:
        aside.write_text("ne")
        assert path.read_text() == "old" and aside.suffix == ".json" and aside.parent == tmp_path
        aside.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["report.json"]


def test_of_a_write_that_fails_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    with pytest.raises(OSError, match="full"), whole(path) as aside:
        aside.write_text("half")
        raise OSError("full")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_two_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with pytest.raises(OSError, match="full"), ExitStack() as stack:
        stack.enter_context(whole(first)).write_text("1")
        stack.enter_context(whole(second))
        raise OSError("full")
    assert os.listdir(tmp_path) == []


def test_text_of_any_characters_is_written(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "ü\udcff")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ü?"
