"""Prefetch: the next batch is made while a step computes.

A batch is a pure function of two numbers, so which thread makes it, and when, changes no bit.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megalina.batch import Batch

PREFETCH = "prefetch"  # how threads' names begin


class Prefetch:
    """Batches by `make(first, count)`, at most one of them ahead.  `device`: where they will be copied to."""

    def __init__(self, make: Callable[[int, int], Batch], device: torch.device):
        self._make, self._device = make, device
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def take(self, first: int, count: int, *, following: int | None) -> Batch:
        """Sequences `first` .. `first + count - 1`; as many from `following` on are made next, while the caller goes on.

        `following` is a guess: a batch that nobody asks for is dropped.  Its error is raised here too, once it is asked for."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] != (first, count):
            ahead[1].cancel()
            ahead = None
        batch = ahead[1].result() if ahead is not None else self._made(first, count)
        if following is not None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, PREFETCH)
            self._ahead = (following, count), self._thread.submit(self._made, following, count)
        return batch

    def close(self) -> None:
        """Wait for what is being made, drop it, and end the thread; `take` begins anew."""
        self._ahead = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def _made(self, first: int, count: int) -> Batch:
        batch = self._make(first, count)
        if self._device.type != "cuda":
            return batch
        with torch.cuda.device(self._device):  # this thread's; else page-locked memory would be GPU 0's
            return batch.pinned()
