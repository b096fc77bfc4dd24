"""The recorder: when each instruction of a step computed, waited and was on the wire, on this rank's clock.

Appending a tuple is all that it does while a step runs; events are made when somebody asks.
"""

from dataclasses import dataclass
from typing import Any, Protocol

COMPUTE, WAIT, SEND = "compute", "wait", "send"


class Mark(Protocol):
    """A moment of an asynchronous device, which tells when it was once it has passed."""

    def seconds(self) -> float: ...


Moment = float | Mark


@dataclass(frozen=True, slots=True)
class Event:
    """One span of one rank.  Times are seconds of this rank's `time.perf_counter`."""

    kind: str  # compute: the device was busy; wait: the program stood at a WAIT; send: something was on the wire
    tag: str  # the instruction, as `B:dispatch>.2.0`
    phase: str
    name: str
    layer: int
    part: str
    op: str  # of wait and send: tokens | counts | gather | scatter | sum | max | grads | params | send | recv; compute: ""
    axis: str  # of wait and send: the axis of the mesh
    num_bytes: int  # send: as megalina.comm.exchange.Pending counts
    enqueued_s: float  # send: when the program asked for it
    start_s: float
    end_s: float
    exposed_s: float = 0.0  # wait: how long the device stood still


class Recorder:
    """The events of the run of a program that it was handed to.  Whoever wants them makes a new one for each run."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []

    def add(
        self,
        kind: str,
        instruction: Any,
        num_bytes: int,
        enqueued_s: Moment,
        start_s: Moment,
        end_s: Moment,
        exposed_s: float | None,
    ) -> None:
        """From any thread; `instruction` is a `megalina.step.program.Instruction`.  `exposed_s` None: all the time from start to
        end."""
        self._rows.append((kind, instruction, num_bytes, enqueued_s, start_s, end_s, exposed_s))

    def events(self) -> list[Event]:
        """In the order in which they ended.  On CUDA they must be asked for before the executor's next recorded run."""
        out = []
        for kind, s, num_bytes, enqueued, start, end, exposed_s in list(self._rows):
            enqueued_s, start_s, end_s = _seconds(enqueued), _seconds(start), _seconds(end)
            op = s.op.name.lower() if s.op is not None else ""
            out.append(
                Event(
                    kind,
                    s.tag,
                    s.phase,
                    s.name,
                    s.layer,
                    s.part,
                    op,
                    s.axis,
                    num_bytes,
                    enqueued_s,
                    start_s,
                    end_s,
                    end_s - start_s if exposed_s is None else exposed_s,
                )
            )
        return out


def _seconds(moment: Moment) -> float:
    return moment if isinstance(moment, int | float) else moment.seconds()
