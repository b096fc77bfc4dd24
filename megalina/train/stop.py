"""The wish to stop: a rank was asked to, by a signal, or its time is up."""

import os
import signal
import time
from types import FrameType


class StopWish:
    """True once SIGTERM or SIGINT came, or after `max_minutes` (0: never).

    The first signal lets the step finish and the run be saved; a second one ends the process at once.
    """

    def __init__(self, *, max_minutes: float):
        self._signalled = False
        self._deadline_s = time.monotonic() + max_minutes * 60 if max_minutes > 0 else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def __call__(self) -> bool:
        return self._signalled or (self._deadline_s is not None and time.monotonic() > self._deadline_s)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = True
