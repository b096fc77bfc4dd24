"""Random delays of a rank: in its program, and where what it sends starts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from megalina.collective_log import CollectiveLog

DELAYS_S = (*[0.0] * 17, 0.001, 0.002, 0.005)


class Delays:
    """Sleeps before instructions and before collectives leave, a function of rank, instruction and seed."""

    def __init__(self, log: CollectiveLog, seed: str):
        self._log, self._seed, self.slept_s = log, seed, 0.0

    def seconds(self, what: str) -> float:
        return Random(f"{self._seed} {self._log.rank} {what}").choice(DELAYS_S)

    def sleep(self, what: str) -> None:
        if (seconds := self.seconds(what)) > 0:
            time.sleep(seconds)
            self.slept_s += seconds

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """In the program's thread when an instruction begins; in the thread that starts a collective, just before it does."""
        log = self._log
        enter, submit = log.position.enter, log.submit

        def late_enter(tag: str, waits: bool) -> None:
            self.sleep(f"instruction {tag}")
            enter(tag, waits)

        def late_submit(*arguments: Any, **named: Any) -> None:
            self.sleep(f"lane {getattr(log.here, 'place', None)}")
            submit(*arguments, **named)

        log.position.enter, log.submit = late_enter, late_submit  # type: ignore[method-assign]
        try:
            yield
        finally:
            log.position.enter, log.submit = enter, submit  # type: ignore[method-assign]
