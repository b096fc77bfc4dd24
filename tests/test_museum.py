"""The museum of silent bugs: a script for each row of docs/silent-bugs.md, which shows the bug with torch alone."""

import ast
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import museum

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
def test_the_commands_of_its_docstring_find_and_name_the_bug_in_less_than_a_minute(name: str) -> None:
    exhibits = museum.exhibited(name)
    assert exhibits and [of for of in exhibits if not of.is_well] == []


def test_what_is_not_named_is_told_and_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"norm_per_rank": "norm_per_rank", "router_detached": "balance_loss_per_rank"}
    monkeypatch.setattr(museum, "exhibited", lambda name: [museum.Exhibit(name, name, found[name], 9.0, 0, 2.0)])
    file = tmp_path / "museum.json"
    assert museum.main(["--only", "norm_per_rank"]) == 0
    assert museum.main(["--only", "norm_per_rank,router_detached", "--json", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 2 named, the slowest in 9.0 s; 2 of 2 scripts run"
    assert [of["named"] for of in json.loads(file.read_text())["exhibits"]] == list(found.values())
    with pytest.raises(SystemExit):
        museum.main(["--only", "no_such"])
