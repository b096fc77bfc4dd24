"""The museum of silent bugs: a script for each row of docs/silent-bugs.md, which shows the bug with torch alone."""

import ast
import json
import re
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalina.cli import verify as verify_layouts

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for path in sorted((ROOT / "museum").glob("*.py"))}
QUICK = ("experts_scaled_by_edp", "message_swapped", "window_too_wide")
MOST_LINES, MOST_CHARACTERS = 60, 132
LAST_LINE = "how to see it in your framework: "


def rows() -> dict[str, list[str]]:
    """Of the table's rows, by the first plant: patterns of the links to reports, and of the commands that plant."""
    table = [line.split("|") for line in (ROOT / "docs" / "silent-bugs.md").read_text().splitlines() if line.startswith("| ")]
    found: dict[str, list[str]] = {}
    for cells in table[1:]:
        reports, planted = cells[1:3]
        plants = re.findall(r"`(\w+)`", planted)
        commands = [rf"python tools/verify_layouts\.py model=\S+(?: \S+=\S+)* --ranks 4 --plant {plant}\b" for plant in plants]
        links = re.findall(r"\((https://[^)]+)\)", reports)
        found[plants[0]] = [*(rf"{re.escape(link)}\b" for link in links), *commands]
    return found


ROWS = rows()


@pytest.fixture(autouse=True)
def defaults_stay() -> Iterator[None]:
    """Scripts set torch's default dtype and seed, as a process of its own may."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(dtype)


def test_rows_and_scripts_are_the_same() -> None:
    assert set(SCRIPTS) == set(ROWS) and len(ROWS) >= 35


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_short(name: str) -> None:
    lines = SCRIPTS[name].read_text().splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= MOST_CHARACTERS


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_names_the_reports_and_the_plants_of_its_row(name: str) -> None:
    said = ast.get_docstring(ast.parse(SCRIPTS[name].read_text())) or ""
    assert [pattern for pattern in ROWS[name] if not re.search(pattern, said)] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_needs_torch_alone(name: str) -> None:
    nodes = list(ast.walk(ast.parse(SCRIPTS[name].read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {module.split(".")[0] for module in modules} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in SCRIPTS])
def test_it_shows_the_bug(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own assertions hold: the bug changes what is printed, and what is right is the same on several ranks."""
    runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    *shown, last = capsys.readouterr().out.splitlines()
    assert last.startswith(LAST_LINE) and last.endswith(".") and len(last) > len(LAST_LINE) + 20
    assert any("with the bug" in line for line in shown) and any("with the bug" not in line for line in shown)


@pytest.mark.full
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_its_docstring_find_and_name_the_bug_in_less_than_a_minute(name: str, tmp_path: Path) -> None:
    said = " ".join((ast.get_docstring(ast.parse(SCRIPTS[name].read_text())) or "").split())
    commands = re.findall(r"python tools/verify_layouts\.py (.*? --plant (\w+))", said)
    assert commands
    for words, plant in commands:
        file, begun_s = tmp_path / f"{plant}.json", time.monotonic()
        assert verify_layouts.main([*words.split(), "--json", str(file)]) == 1
        assert json.loads(file.read_text())["named"] == plant
        assert time.monotonic() - begun_s < 60
