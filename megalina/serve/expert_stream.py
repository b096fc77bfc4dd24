"""The stream of experts: on CUDA they come on a stream of their own, behind what is computed.

The host only asks for copies, which from page-locked memory it never waits for.  Two things must be waited for on the device:
a copy may not overwrite what an earlier computation still reads, and a computation may not read what has not come.

The order is tested on made-up streams; on a GPU it has not been run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ExpertStream:
    """Of one device, on which its slots lie."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """Where the computation of this thread is: all that it has been asked for until now."""
        return torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event) -> Iterator[None]:
        """Copies in this block begin once the computation has got to the mark."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield

    def asked(self) -> torch.cuda.Event:
        """All copies that were asked for until now."""
        return self._stream.record_event()

    def hold(self, copies: torch.cuda.Event) -> None:
        """What this thread computes from now on comes after these copies; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(copies)

    def synchronize(self) -> None:
        """The host waits for all copies: only then may their memory go."""
        self._stream.synchronize()
