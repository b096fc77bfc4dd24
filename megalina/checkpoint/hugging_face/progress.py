"""Progress of bytes: how many of them, at which rate, how long it still takes; and whether there is room for them."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megalina.console import StatusLine

SHOWN_EVERY_S = 0.2


class Progress:
    """A line on stderr, as `StatusLine` shows it."""

    def __init__(
        self, what: str, total_bytes: int, *, line: StatusLine | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._line, self._clock = what, total_bytes, line or StatusLine(), clock
        self._begin_s = self._shown_s = clock()
        self._done = 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        now_s = self._clock()
        if now_s - self._shown_s >= SHOWN_EVERY_S:
            self._shown_s = now_s
            rate = self._done / max(now_s - self._begin_s, 1e-9)
            left_s = round((self._total - self._done) / max(rate, 1e-9))
            share = f"{self._done / 1e9:,.2f} of {self._total / 1e9:,.2f} GB ({self._done / max(self._total, 1):.0%})"
            self._line.show(f"{self._what}: {share}, {rate / 1e6:,.0f} MB/s, {left_s // 60}:{left_s % 60:02d} left")

    def end(self) -> None:
        self._line.end()


def check_room(target: Path, num_bytes: int) -> None:
    """ValueError where the disk of `target`, which is not there yet, has not so many bytes left."""
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{target} needs {num_bytes / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there: make room or choose another disk"
        )
