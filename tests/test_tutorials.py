"""Tutorials are true: their Python blocks run one after another, as a reader would run them, and print what the page says.

Commands: test_doc_commands.py."""

import io
import re
import tokenize
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def said_of(block: str) -> list[str]:
    """The comments at the left: what it prints."""
    tokens = tokenize.generate_tokens(io.StringIO(block).readline)
    left = [t.string for t in tokens if t.type == tokenize.COMMENT and t.start[1] == 0]
    return [text.removeprefix("#").strip() for text in left]


def run(page: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each block prints.  Names stay from block to block."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), names)
        printed.append(capsys.readouterr().out)
    return printed


def test_a_step_as_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    listed, checked, broken, timed, moved = run("tutorial-step-as-a-list.md", capsys)
    assert "COMPUTE F:embed.-.0" in listed and not checked
    assert "F:experts.0.0" in broken
    assert timed.splitlines()[0].startswith("eager: ") and (tmp_path / "steps.png").stat().st_size > 10_000
    before_ms, after_ms = map(float, re.findall(r"([\d.]+) ms", moved))
    assert after_ms <= before_ms


@pytest.mark.parametrize(
    "page",
    [
        "tutorial-own-schedule.md",
        "tutorial-own-pipeline.md",
        pytest.param("tutorial-own-router.md", marks=pytest.mark.full),  # these two start ranks
        pytest.param("tutorial-own-layer.md", marks=pytest.mark.full),
    ],
)
def test_blocks_print_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = list(map(said_of, blocks_of(page)))
    assert sum(map(len, expected)) >= 3
    for block, printed, said in zip(blocks_of(page), run(page, capsys), expected, strict=True):
        assert not said or [line.strip() for line in printed.splitlines()] == said, block


def test_a_rank_finds_its_place_under_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "tutorial-slurm.md").read_text()
    (printed,) = run("tutorial-slurm.md", capsys)
    assert printed in page
