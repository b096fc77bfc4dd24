"""Progress: how far a run is, on stderr, for the person at the terminal.  Nothing goes to stdout."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """7 s | 3 min 20 s | 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) and math.isfinite(value) else "-"


def _stands_still(record: Mapping[str, Any]) -> str:
    """ "waits 186 ms for all-to-alls (slowed 1.8x), 45 ms for gradients" of a step."""
    slowed = f" (slowed {record['a2a_slowdown']:.1f}x)" if record.get("a2a_slowdown") is not None else ""
    a2a_ms, grads_ms = (_number(1e3 * record[key], ",.0f") for key in ("a2a_exposed_s", "grads_exposed_s"))
    stages = f", {_number(1e3 * record['pp_exposed_s'], ',.0f')} ms for other stages" if "pp_exposed_s" in record else ""
    return f"waits {a2a_ms} ms for all-to-alls{slowed}, {grads_ms} ms for gradients{stages}"


def _task_scores(record: Mapping[str, Any]) -> str:
    """ "tasks 0.21 (1.43 bits/byte)": means over tasks, of accuracy above chance and of the right answers' bits; "" where a step
    has none."""
    keys = [key.rpartition("/")[0] for key in record if key.startswith("eval/") and key.endswith("/bits_per_byte")]
    if not keys:
        return ""
    centred, bits = (sum(record[f"{key}/{what}"] for key in keys) / len(keys) for what in ("centred_accuracy", "bits_per_byte"))
    return f"tasks {_number(centred, '.2f')} ({_number(bits, '.2f')} bits/byte)"


class Progress:
    """Use as a context manager, so that the terminal is given back whatever happens.

    kind `auto`: a live bar if `stream` is a terminal, else as `plain`: a line at the first and last step and about every ten
    seconds between.  `none`: nothing.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        kind: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stream`: sys.stderr unless given."""
        if kind not in ("auto", "plain", "none"):
            raise ValueError(f"tracker.progress is {kind!r}; it must be auto, plain or none")
        self._stream = stream or sys.stderr
        self._total_steps, self._start_step = total_steps, start_step
        self._clock = clock
        self._start_s = clock()
        self._line_s = -math.inf
        self._val_loss: float | None = None
        self._tasks = ""  # scores, newest
        self._plain = kind == "plain" or (kind == "auto" and not self._stream.isatty())
        self._bar: RichProgress | None = None
        if kind == "auto" and not self._plain:
            self._bar = RichProgress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                console=Console(file=self._stream),
                redirect_stdout=False,  # the last line of stdout is for programs
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, numbers="starting")
            self._bar.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """A step's record, as it goes to the tracker."""
        if record.get("val_loss") is not None:
            self._val_loss = record["val_loss"]
        self._tasks = _task_scores(record) or self._tasks
        step = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=self.numbers(record))
            return
        now = self._clock()
        if self._plain and (now - self._line_s >= LINE_EVERY_S or step == self._total_steps):
            self._line_s = now
            width = len(str(self._total_steps))
            print(f"step {step:{width}d}/{self._total_steps}  {self.numbers(record)}", file=self._stream, flush=True)

    def numbers(self, record: Mapping[str, Any]) -> str:
        """loss, newest validation loss and scores on tasks, gradient norm, tokens/s, what the device waited for if that is
        measured, time to go (from this process's own pace)."""
        step = record["step"]
        done = step - self._start_step
        left_s = (self._clock() - self._start_s) / done * (self._total_steps - step) if done > 0 else 0.0
        parts = [f"loss {_number(record.get('loss'), '.4f')}"]
        if self._val_loss is not None:
            parts.append(f"val {_number(self._val_loss, '.4f')}")
        parts += [self._tasks] if self._tasks else []
        parts.append(f"norm {_number(record.get('grad_norm'), '.2f')}")
        parts.append(f"{_number(record.get('tokens_per_s'), ',.0f')} tokens/s")
        if record.get("a2a_exposed_s") is not None:
            parts.append(_stands_still(record))
        if step < self._total_steps:
            parts.append(f"{duration(left_s)} left")
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back.  May be called twice."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
