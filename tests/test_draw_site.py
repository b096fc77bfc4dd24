"""Pictures of the site: what is missing is said in one line; a browser gets pages of this machine and the size of the screen."""

import stat
import sys
from pathlib import Path

import pytest

from tests.commands import done
from tools import draw_site

BROWSER = f"""#!{sys.executable}
import sys, urllib.request
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
page = urllib.request.urlopen(sys.argv[-1]).read().decode()
open(given["--screenshot"], "w").write(given["--window-size"] + " " + page)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for path in draw_site.PAGES.values():
        (tmp_path / "site" / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / path / "index.html").write_text(f"page {path}")
    return tmp_path / "site"


def browser(tmp_path: Path, script: str) -> Path:
    file = tmp_path / "browser"
    file.write_text(script)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_every_page_is_drawn_on_both_screens(tmp_path: Path, site: Path) -> None:
    job = done(draw_site.main, "--site", site, "--out", tmp_path / "out", "--browser", browser(tmp_path, BROWSER))
    assert job.returncode == 0, job.stderr
    drawn = {file.stem: file.read_text().strip() for file in (tmp_path / "out").iterdir()}
    assert len(drawn) == 8
    assert drawn["start-wide"] == "1280,900 page"
    assert drawn["tutorial-narrow"] == "390,844 page tutorial-first-training/"


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("--out", tmp_path / "out")
    job = done(draw_site.main, *out, "--site", tmp_path, "--browser", "chromium")
    assert (job.returncode, job.stderr) == (2, f"{tmp_path} has no index.html: run make docs first\n")
    failed = done(draw_site.main, *out, "--site", site, "--browser", browser(tmp_path, "#!/bin/sh\necho no display >&2\n"))
    assert failed.returncode == 1 and failed.stderr.strip().endswith("no display") and failed.stderr.count("\n") == 1
    monkeypatch.setenv("PATH", "")
    none = done(draw_site.main, *out, "--site", site)
    assert none.returncode == 2 and "apt-get install chromium" in none.stderr
