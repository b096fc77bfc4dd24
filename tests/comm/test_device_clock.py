"""What is recorded on CUDA, on made-up streams: each knows how far it has got, in seconds; the host never waits."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalina.collective_log import CollectiveLog
from megalina.comm.device_clock import DeviceClock
from megalina.comm.exchange import Pending
from megalina.comm.links import Links
from megalina.step.program import Instruction, Kind, Op
from megalina.timeline.recorder import Event, Recorder

ZERO_S = 50.0  # the host's clock at `begin`; the device's starts at 7


class Device:
    """Streams, and one queue for each communicator."""

    def __init__(self) -> None:
        self.current = self.main = Stream(self)
        self.free_s: dict[str, float] = {}

    def launch(self, axis: str, seconds: float) -> "Work":
        """Starts when the current stream is here and what was sent along the axis before has ended."""
        start_s = max(self.current.at_s, self.free_s.get(axis, 0.0))
        self.free_s[axis] = start_s + seconds
        return Work(self, start_s + seconds)


class Stream:
    def __init__(self, device: Device):
        self.at_s, self.device = 7.0, device

    def wait_stream(self, other: "Stream") -> None:
        self.at_s = max(self.at_s, other.at_s)


class Work:
    def __init__(self, device: Device, end_s: float):
        self.device, self.end_s = device, end_s

    def wait(self) -> None:
        self.device.current.at_s = max(self.device.current.at_s, self.end_s)


class CudaEvent:
    def __init__(self, device: Device):
        self.device, self.at_s = device, float("nan")

    def record(self) -> None:
        self.at_s = self.device.current.at_s

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "CudaEvent") -> float:
        return 1e3 * (later.at_s - self.at_s)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    @contextmanager
    def stream(other: Stream) -> Any:
        before, made.current = made.current, other
        yield
        made.current = before

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: CudaEvent(made))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(made))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("megalina.comm.device_clock.time", SimpleNamespace(perf_counter=lambda: ZERO_S))
    return made


def sent(device: Device, *, on: bool = True) -> list[Event]:
    """Two exchanges of tokens of 2 s and 1 s, gradients of 5 s that yield to them, while the main stream computes for 1 s."""
    recorder, marks = Recorder(), DeviceClock()
    links = Links(CollectiveLog(0), cuda=True, marks=marks)
    marks.begin()

    def send(instruction: Instruction, seconds: float, num_bytes: int) -> None:
        def launch() -> Pending:
            return Pending(device.launch(instruction.axis, seconds), lambda: torch.zeros(0), num_bytes)  # type: ignore[arg-type]

        links.send(instruction, launch, recorder=recorder if on else None)

    send(Instruction("F", Kind.START, "dispatch", 0, op=Op.TOKENS, axis="ep"), 2.0, 10)
    send(Instruction("F", Kind.START, "dispatch", 1, op=Op.TOKENS, axis="ep"), 1.0, 20)
    send(Instruction("B", Kind.START, "dense.0", op=Op.GRADS, axis="dp", yields_to=(Op.TOKENS,)), 5.0, 30)
    device.main.at_s += 1.0
    send(Instruction("B", Kind.START, "dense.1", op=Op.GRADS, axis="dp"), 1.0, 40)
    assert device.main.at_s == 8.0  # nobody made the stream that computes wait
    return recorder.events()


def test_collectives_start_when_their_communicator_is_free_and_end_when_they_end(device: Device) -> None:
    spans = [(e.tag, e.num_bytes, e.start_s - ZERO_S, e.end_s - ZERO_S) for e in sent(device)]
    assert spans == [
        ("F:dispatch>.0.0", 10, 0, 2),
        ("F:dispatch>.1.0", 20, 2, 3),  # behind the first
        ("B:dense.0>.-.0", 30, 3, 8),  # held back by both
        ("B:dense.1>.-.0", 40, 8, 9),  # asked for at 1, behind the other gradients
    ]


def test_without_a_recorder_nothing_is_marked(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceClock, "now", lambda self: pytest.fail("marked"))
    assert sent(device, on=False) == []


def test_a_mark_is_told_on_the_hosts_clock(device: Device) -> None:
    clock = DeviceClock()
    clock.begin()
    device.main.at_s += 0.25
    recorder = Recorder()
    recorder.add("wait", Instruction("F", Kind.WAIT, "dispatch", 0, op=Op.TOKENS, axis="ep"), 0, 1.0, ZERO_S, clock.now(), None)
    (event,) = recorder.events()
    assert (event.start_s, event.end_s, event.exposed_s) == (ZERO_S, ZERO_S + 0.25, 0.25)
