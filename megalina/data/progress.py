"""A progress display on stderr: a bar with MB/s and the time left on a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class ProgressDisplay:
    """Counts `disk_bytes` towards a total (for the time left) and `text_bytes` for the speed."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self._title, self._total_bytes = title, max(1, total_bytes)
        self._begin_s = self._line_s = time.monotonic()
        self._disk_bytes = self._text_bytes = 0
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=self._total_bytes, speed="")
            self._bar.start()

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, disk_bytes: int, text_bytes: int) -> None:
        self._disk_bytes += disk_bytes
        self._text_bytes += text_bytes
        now_s = time.monotonic()
        passed_s = max(now_s - self._begin_s, 1e-9)
        speed = f"{self._text_bytes / 1e6:.1f} MB, {self._text_bytes / 1e6 / passed_s:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(self._disk_bytes, self._total_bytes), speed=speed)
        elif now_s - self._line_s >= _LINE_EVERY_S:
            self._line_s = now_s
            share = min(1.0, self._disk_bytes / self._total_bytes)
            left_s = passed_s * (1 - share) / max(share, 1e-9)
            print(f"{self._title}: {share:.0%}, {speed}, {left_s:.0f} s left", file=sys.stderr, flush=True)
