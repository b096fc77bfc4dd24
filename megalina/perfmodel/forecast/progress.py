"""The progress of a forecast on stderr: a bar with the time left on a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class Bar:
    """Call it with how many of how many are done, and of what; another `what` begins anew."""

    def __init__(self) -> None:
        self._begin_s = self._line_s = time.monotonic()
        self._what = ""
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("")

    def __enter__(self) -> "Bar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        now_s = time.monotonic()
        if what != self._what:
            self._what, self._begin_s = what, now_s
            if self._bar is not None:
                self._bar.reset(self._task, total=total, description=what)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done and now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            left_s = (now_s - self._begin_s) / done * (total - done)
            print(f"{what}: {done}/{total}, {left_s:.0f} s left", file=sys.stderr, flush=True)
