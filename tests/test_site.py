"""The site: strict, and without anything from another server.  `make docs` builds it; here where its extra is installed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASSET = re.compile(r"""<(?:link|script|img|iframe)\b[^>]*\b(?:href|src)=["']?(https?:)?//""")


def test_every_page_is_in_the_navigation() -> None:
    shown = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert shown == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.full
def test_it_is_built_without_a_warning_and_asks_nobody_else(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # links out of the folder are refused
    (tmp_path / "megalina").symlink_to(ROOT / "megalina")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 25
    assert [page.name for page in pages if ASSET.search(page.read_text())] == []
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "The configuration of" in api  # docstrings are there
