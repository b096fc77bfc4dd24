"""docs/results.md is what results/ says, and every file there names its command, date, machine and commit."""

import json
from pathlib import Path

import pytest

from benchmarks import results_page
from benchmarks.results_page import About, page, without_orders
from benchmarks.results_tables import KINDS, Table
from tests.commands import done

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "results").glob("*.json"))


def test_the_page_is_drawn_from_the_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == page()
    assert done(results_page.main, "--check").returncode == 0


def test_there_are_results_and_each_says_where_it_is_from() -> None:
    assert len(FILES) >= 6
    for file in FILES:
        held = json.loads(file.read_text())
        about = About(**held["about"])
        assert about.kind in KINDS and all((about.title, about.command, about.machine, about.commit)), file.name
        assert len(about.date.split("-")) == 3
        program = next(word for word in about.command.split() if word.endswith(".py"))
        assert (ROOT / program).is_file(), program
        for table in KINDS[about.kind](held["result"]):
            assert table.rows and {len(row) for row in table.rows} == {len(table.head)}


def test_a_result_is_kept_without_orders_and_one_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(results_page, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    wire = {"name": "AdamW", "zero": 0, "step_ms": 9.0, "step_quartiles_ms": [8.0, 10.0], "tail_ms": 2.0,
            "tail_quartiles_ms": [1.0, 3.0], "virtual_step_ms": 8.5, "virtual_tail_ms": 1.5}  # fmt: skip
    (tmp_path / "wire.json").write_text(json.dumps({"wire": [wire], "plan": {"order": ["a"], "parts": 2}}))
    given = ["--title", "T", "--command", "python x.py", "--date", "2026-12-01", "--machine", "O", "--commit", "abc"]
    said = done(results_page.main, "add", tmp_path / "wire.json", "--name", "wire", "--kind", "muon_wire", *given)
    assert (said.returncode, said.stdout) == (0, "results.md\n")
    kept = json.loads((tmp_path / "results" / "wire.json").read_text())
    assert kept["result"]["plan"] == {"parts": 2}
    assert "| AdamW | 0 | 9 (8 - 10) | 2 (1 - 3) | 8 | 2 |" in (tmp_path / "results.md").read_text()
    (tmp_path / "results.md").write_text("another")
    assert done(results_page.main, "--check").returncode == 1
    with pytest.raises(ValueError, match="no result of kind ladder"):
        results_page.main(["add", str(tmp_path / "wire.json"), "--name", "x", "--kind", "ladder", *given])


def test_orders_go_wherever_they_are() -> None:
    assert without_orders([{"order": [1], "a": {"order": 2, "b": [3]}}]) == [{"a": {"b": [3]}}]


def test_a_table_is_markdown() -> None:
    assert Table(("a", "b"), [("1", "2")]).lines() == ["| a | b |", "|---|---|", "| 1 | 2 |"]
