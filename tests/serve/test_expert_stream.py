"""Experts that come on a stream of their own, on made-up streams: they run as late as they may, in the worst order."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from megalina.placement.placement import EMPTY, Placement
from megalina.serve.host_experts import ExpertStream
from megalina.serve.slots import Slots
from tests.serve.test_slots import EXPERTS, HERE, THERE, held, host, wanted


class Stream:
    """What it is asked for it does when somebody waits for it, and not before."""

    def __init__(self, device: object = None):
        self.asked: list[Callable[[], object]] = []
        self.done = 0

    def run_until(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.asked[self.done - 1]()

    def record_event(self) -> Callable[[], None]:
        position = len(self.asked)
        return lambda: self.run_until(position)

    def wait_event(self, event: Callable[[], None]) -> None:
        self.asked.append(event)

    def synchronize(self) -> None:
        self.run_until(len(self.asked))


class Streams(threading.local):
    """`main` is that of the computation; a thread is on the one that it has chosen."""

    main = Stream()
    current = main

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    made.__class__.main = made.__class__.current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.current)
    return made


def slots_of(streams: Streams, placements: list[Placement], *, spare: int = 3) -> Slots:
    def copy(to: torch.Tensor, source: torch.Tensor) -> None:
        streams.current.asked.append(lambda: to.copy_(source))

    return Slots(host(), placements, 0, spare=spare, copy=copy, stream=ExpertStream(torch.device("cpu")))


def test_what_is_computed_after_install_finds_the_experts_and_the_host_did_not_wait(streams: Streams) -> None:
    slots = slots_of(streams, [HERE])
    slots.fetch(0, THERE)
    assert slots.ready(0)
    slots.install(0)
    assert held(slots, 0) != wanted(slots, 0)  # nothing has been copied yet: nobody stood still
    found: list[dict[int, float]] = []
    streams.main.asked.append(lambda: found.append(held(slots, 0)))
    streams.main.synchronize()
    assert found == [wanted(slots, 0)]
    slots.close()


def test_a_copy_does_not_overwrite_what_an_earlier_computation_reads(streams: Streams) -> None:
    full = Placement(EXPERTS, ((0, 1), (2, 3)))
    slots = slots_of(streams, [full], spare=2)
    before, found = [slots.weights(0, s)["w1"] for s in range(2)], []
    streams.main.asked.append(lambda: found.extend(float(w[0, 0]) for w in before))
    for placement in (Placement(EXPERTS, ((2, 3), (0, 1))), full):  # the second one comes where the first experts were
        slots.fetch(0, placement)
        slots.install(0)
    slots.close()  # all copies are done, and the computation only so far as these had to wait for it
    assert found == [0.0, 1.0]


@pytest.mark.parametrize("given_up", [True, False])
def test_experts_that_did_not_come_are_copied_at_once_and_stay(streams: Streams, given_up: bool) -> None:
    slots = slots_of(streams, [HERE, HERE])
    if given_up:  # its copies are still to come, into places that are free again
        slots.fetch(1, Placement(EXPERTS, ((2, 3, 2), (0, 1, EMPTY))))
        assert slots.ready(1)
        slots.discard(1)
    copy = slots.copy

    def half(to: torch.Tensor, source: torch.Tensor) -> None:
        slots.copy = fail
        copy(to, source)

    def fail(to: torch.Tensor, source: torch.Tensor) -> None:
        raise OSError("planted")

    slots.copy = half
    for placement in (THERE, Placement(EXPERTS, ((0, 1, 3), (2, 3, 0)))):
        slots.fetch(0, placement)
        slots.install(0)
    streams.main.synchronize()
    slots.close()
    assert slots.done.failed == 2 and held(slots, 0) == wanted(slots, 0)
    assert not any(slots._is_host(t) for t in slots._held[0] if t is not None)  # a device can't compute with host memory
