"""A stopwatch: how long a call takes on a device, repeated for a while; and whether this rank had its core meanwhile.

On a CPU its clock is the CPU time of this thread, which on a quiet machine is the time on the wall, and on a busy one leaves out
when others had the core (not what they do to caches and memory).  Where ranks are more than cores, it goes as much faster.
"""

import statistics
import time
from collections.abc import Callable

import torch

BATCH_S = 0.002  # calls are timed together until a batch lasts so long: a clock, and on CUDA a wait, cost microseconds
LEAST_BATCHES = 3


class Stopwatch:
    """`seconds`: how long one thing is repeated, whatever it is, so that ranks that begin together are busy together."""

    def __init__(self, device: torch.device, *, seconds: float, threads_a_core: float = 1.0):
        """`threads_a_core`: of all ranks; where it is above 1 they take turns in training as well."""
        self.device = device
        self._clock = time.perf_counter if device.type == "cuda" else time.thread_time
        self._factor = 1.0 if device.type == "cuda" else max(1.0, threads_a_core)
        self._seconds = seconds
        self._wall_s = self._cpu_s = 0.0

    def median_s(self, call: Callable[[], object]) -> float:
        """Of one call, the median over batches; the first calls, which warm up, don't count."""
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        took_s, calls = self._batch_s(call, 1), 1
        while (took_s := self._batch_s(call, calls)) < BATCH_S:
            calls = min(2 * calls, int(calls * BATCH_S / max(took_s, 1e-9)) + 1)
        batches, end_s = [took_s / calls], time.perf_counter() + self._seconds
        while len(batches) < LEAST_BATCHES or time.perf_counter() < end_s:
            batches.append(self._batch_s(call, calls) / calls)
        self._wall_s += time.perf_counter() - wall_s
        self._cpu_s += time.thread_time() - cpu_s
        return statistics.median(batches)

    @property
    def core_share(self) -> float:
        """Of what was timed: CPU time of this thread over wall time.  Well below 1 on a CPU: something else had the core."""
        return self._cpu_s / self._wall_s if self._wall_s else 1.0

    def _batch_s(self, call: Callable[[], object], calls: int) -> float:
        self.wait()
        started_s = self._clock()
        for _ in range(calls):
            call()
        self.wait()
        return (self._clock() - started_s) * self._factor

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
