"""Progress displays on stderr: a bar with the time left on a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class _Display:
    """Live within a `with` block.  `count`: the bar's column that says how far it is; `transient`: taken away at the end."""

    def __init__(self, title: str, count: ProgressColumn, *, total: float, transient: bool) -> None:
        self._begin_s = self._line_s = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=transient)
            self._task = self._bar.add_task(title, total=total, speed="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line_is_due(self, now_s: float) -> bool:
        due = now_s - self._line_s >= LINE_EVERY_S
        self._line_s = now_s if due else self._line_s
        return due


class Bar(_Display):
    """Call it with how many of how many are done, and of what; another `what` begins anew."""

    def __init__(self) -> None:
        super().__init__("", MofNCompleteColumn(), total=100.0, transient=True)
        self._what = ""

    def __call__(self, done: int, total: int, what: str) -> None:
        now_s = time.monotonic()
        if what != self._what:
            self._what, self._begin_s = what, now_s
            if self._bar is not None:
                self._bar.reset(self._task, total=total, description=what)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done and self._line_is_due(now_s):
            left_s = (now_s - self._begin_s) / done * (total - done)
            print(f"{what}: {done}/{total}, {left_s:.0f} s left", file=sys.stderr, flush=True)


class SpeedDisplay(_Display):
    """With MB/s: counts `disk_bytes` towards a total (for the time left) and `text_bytes` for the speed."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self._title, self._total_bytes = title, max(1, total_bytes)
        self._disk_bytes = self._text_bytes = 0
        super().__init__(title, TextColumn("{task.fields[speed]}"), total=self._total_bytes, transient=False)

    def advance(self, disk_bytes: int, text_bytes: int) -> None:
        self._disk_bytes += disk_bytes
        self._text_bytes += text_bytes
        now_s = time.monotonic()
        passed_s = max(now_s - self._begin_s, 1e-9)
        speed = f"{self._text_bytes / 1e6:.1f} MB, {self._text_bytes / 1e6 / passed_s:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(self._disk_bytes, self._total_bytes), speed=speed)
        elif self._line_is_due(now_s):
            share = min(1.0, self._disk_bytes / self._total_bytes)
            left_s = passed_s * (1 - share) / max(share, 1e-9)
            print(f"{self._title}: {share:.0%}, {speed}, {left_s:.0f} s left", file=sys.stderr, flush=True)
