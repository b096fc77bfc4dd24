"""The clock of a CUDA device: moments of its streams, told on the host's clock once they have passed.

Its logic is tested on made-up streams; on a GPU it has not been run.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class StreamMark:
    """When a stream got to `event`, or if that was later, when it got to `or_later`."""

    clock: "DeviceClock"
    event: Any  # torch.cuda.Event
    or_later: "StreamMark | None" = None

    def seconds(self) -> float:
        """On the clock of `time.perf_counter`; waits for the moment to pass."""
        self.event.synchronize()
        own_s = self.clock.zero_s + self.clock.zero.elapsed_time(self.event) / 1e3
        return own_s if self.or_later is None else max(own_s, self.or_later.seconds())


@dataclass(slots=True)
class DeviceClock:
    """`begin` at each step, so that the two clocks can't drift apart; marks of earlier steps are void then."""

    zero: Any = None  # torch.cuda.Event, at zero_s of the host's clock
    zero_s: float = 0.0
    _streams: dict[str, Any] = field(default_factory=dict)  # axis -> a stream that only waits for what is sent along it
    _last: dict[str, StreamMark] = field(default_factory=dict)  # axis -> when what was sent last along it ended

    def begin(self) -> None:
        torch.cuda.synchronize()
        self.zero = torch.cuda.Event(enable_timing=True)
        self.zero.record()
        self.zero.synchronize()
        self.zero_s = time.perf_counter()
        self._last = {}

    def now(self) -> StreamMark:
        """When the current stream gets here."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return StreamMark(self, event)

    def of_work(self, work: Any, axis: str, enqueued: StreamMark) -> tuple[StreamMark, StreamMark]:
        """When a collective that was launched at `enqueued` starts and ends.

        One communicator runs its collectives one after another, so it starts where its stream got to it, or where the one
        before it along the same axis ended."""
        start = StreamMark(self, enqueued.event, self._last.get(axis))
        stream = self._streams.get(axis)
        if stream is None:
            stream = self._streams[axis] = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work.wait()  # neither the host waits, nor a stream that computes
            end = self.now()
        self._last[axis] = end
        return start, end
