"""A status line: written over on a terminal, a line now and then in a log."""

import io

import pytest

from megalina.console import StatusLine


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "11")
    stream = Stream(terminal=True)
    line = StatusLine(stream, clock=Clock())
    line.show("one")
    line.show("two, which is longer")
    line.end()
    line.end()
    assert stream.getvalue() == "\r\x1b[Kone" + "\r\x1b[Ktwo, which" + "\r\x1b[K"


def test_a_log_has_a_line_every_ten_seconds_and_none_of_a_short_job() -> None:
    stream, clock = Stream(terminal=False), Clock()
    line = StatusLine(stream, clock=clock)
    for step in range(35):
        clock.now_s = step * 0.999
        line.show(f"step {step} ")
    line.end()
    assert stream.getvalue() == "step 11\nstep 22\nstep 33\n"
