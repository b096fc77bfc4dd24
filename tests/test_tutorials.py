"""Tutorials are true: their Python blocks run one after another, as a reader would run them.  Commands: test_doc_commands.py."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_a_step_as_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tutorial-step-as-a-list.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed = []
    for block in blocks:
        exec(compile(block, "tutorial-step-as-a-list.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    listed, checked, broken, timed, moved = printed
    assert "COMPUTE F:embed.-.0" in listed and not checked
    assert "F:experts.0.0" in broken
    assert timed.splitlines()[0].startswith("eager: ") and (tmp_path / "steps.png").stat().st_size > 10_000
    before_ms, after_ms = map(float, re.findall(r"([\d.]+) ms", moved))
    assert after_ms <= before_ms
