"""Progress displays: a bar on a terminal, a plain line every ten seconds anywhere else."""

import io
import sys

import pytest

from megalina.cli import progress
from megalina.cli.progress import Bar, SpeedDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_they_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Bar() as bar:
        for done in range(3):
            bar(done, 2, "layouts")
    with SpeedDisplay("tokens", 200) as speed:
        speed.advance(100, 4_000_000)
        speed.advance(200, 4_000_000)
    assert "layouts" in shown.getvalue() and "2/2" in shown.getvalue()
    assert "tokens" in shown.getvalue() and "8.0 MB" in shown.getvalue()


def test_elsewhere_they_are_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 1.0, 11.0, 12.0, 30.0, 42.0, 43.0, 54.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with Bar() as bar:
        for done in range(4):
            bar(done, 4, "layouts")
    with SpeedDisplay("tokens", 200) as speed:
        speed.advance(50, 6_000_000)
        speed.advance(50, 6_000_000)
    said = capsys.readouterr().err.splitlines()
    assert said == ["layouts: 1/4, 30 s left", "layouts: 3/4, 10 s left", "tokens: 50%, 12.0 MB, 1.0 MB/s, 12 s left"]
