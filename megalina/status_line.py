"""A status line: how far a command is, on stderr, for whoever waits for it."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

LINE_EVERY_S = 10.0


class StatusLine:
    """On a terminal one line that is written over.  Anywhere else, such as in a log, a line of its own every ten seconds, the
    first of them after ten."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`stream`: sys.stderr unless given."""
        self._stream, self._clock = stream or sys.stderr, clock
        self._live, self._shown_s = self._stream.isatty(), clock()
        self._under_way = False

    def show(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps can't be written over
            print(f"\r\x1b[K{text[:width]}", end="", file=self._stream, flush=True)
            self._under_way = True
        elif self._clock() - self._shown_s >= LINE_EVERY_S:
            print(text.rstrip(), file=self._stream, flush=True)
            self._shown_s = self._clock()

    def end(self) -> None:
        """Takes the line away: what is printed next begins a line."""
        if self._under_way:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._under_way = False
