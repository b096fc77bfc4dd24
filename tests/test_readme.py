"""The README is short and true: its code runs, its links lead somewhere; the map names every file that it should.

Its commands, as those of all documents: test_doc_commands.py."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megalina.verify.plants import PLANTS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "map.md").read_text()
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))


def test_it_is_read_in_a_few_minutes() -> None:
    assert len(README.splitlines()) <= 130


def test_its_code_prints_lists(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[2] == printed[2].split()[2] == "F:embed.-.0" and printed[0] != printed[2]
    assert [" instructions, " in line for line in printed] == [False, True, False, True]
    for tag in re.findall(r"`([A-Z]:[^`]*)`", README):
        assert re.fullmatch(r"[A-Z]:\w+[<>]?\.\d\.\d|B:dense\.\d>", tag), tag


def test_the_two_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("pretrain", "test", "benchmark"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.M)


def links_of(document: Path) -> list[str]:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    return [os.path.normpath(document.parent / link) for link in links if "://" not in link]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    assert [link for link in links_of(document) if not Path(link).exists()] == []


def test_links_lead_to_files_that_a_clone_has() -> None:
    links = sorted({link for document in DOCUMENTS for link in links_of(document)})
    ignored = subprocess.run(["git", "check-ignore", *links], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout.split() == []


def test_every_file_that_the_map_names_exists() -> None:
    table = MAP.split("## Where is ...?")[1].split("## The tree")[0]
    folder = ""
    missing = []
    for row in table.splitlines():
        for name in re.findall(r"`([\w/]+\.?\w*/?)`", row):
            path = ROOT / name if "/" in name else ROOT / folder / name
            folder = str(Path(name).parent) if "/" in name else folder
            if "." in name or name.endswith("/"):
                missing += [] if path.exists() else [name]
    assert missing == []


def test_the_tree_names_every_package_and_tool() -> None:
    tree = MAP.split("## The tree")[1]
    for package in sorted(p.parent.name for p in (ROOT / "megalina").glob("*/__init__.py")):
        assert f"  {package}/" in tree, package
    for beside in ("papers", "benchmarks"):
        for package in sorted(p.parent.name for p in (ROOT / beside).glob("*/__init__.py")):
            assert f"{package}/" in tree, package
    assert "placement_lab/" in tree
    for path in [*(ROOT / "megalina").glob("[!_]*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("[!_]*.py")]:
        assert path.stem in tree, path


def test_silent_bugs_are_plants() -> None:
    rows = [r.split("|") for r in (ROOT / "docs" / "silent-bugs.md").read_text().splitlines() if r.startswith("| ")][1:]
    named = [re.findall(r"`(\w+)`", row[2]) for row in rows]
    assert len(rows) >= 30 and all(named)
    assert [name for names in named for name in names if name not in PLANTS] == []
