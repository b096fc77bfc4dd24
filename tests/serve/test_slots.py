"""Slots: experts come behind the computation; a fetch that is cancelled or fails leaves everything as it was."""

import threading

import pytest
import torch

from megalina.placement.placement import EMPTY, Placement
from megalina.serve.host_experts import ExpertShape, HostExperts
from megalina.serve.slots import Slots

EXPERTS, SHAPE = 4, ExpertShape(("w1", "w2"), (torch.Size((2, 3)), torch.Size((3,))), torch.float32)
HERE = Placement(EXPERTS, ((0, 1, EMPTY), (2, 3, EMPTY)))
THERE = Placement(EXPERTS, ((3, 2, 1), (0, 2, 1)))


def host(layers: int = 2) -> HostExperts:
    memory = torch.arange(layers * EXPERTS, dtype=torch.float32).view(layers, EXPERTS, 1).expand(-1, -1, SHAPE.numel).clone()
    return HostExperts(SHAPE, memory)


def held(slots: Slots, layer: int) -> dict[int, float]:
    """Which expert's values are in each slot of this device, by what is computed with them."""
    experts = slots.placement(layer).slots[slots.device]
    return {s: float(slots.weights(layer, s)["w1"][0, 0]) - layer * EXPERTS for s, e in enumerate(experts) if e != EMPTY}


def wanted(slots: Slots, layer: int) -> dict[int, float]:
    return {s: float(e) for s, e in enumerate(slots.placement(layer).slots[slots.device]) if e != EMPTY}


def buffers(slots: Slots) -> int:
    own = sum(t is not None and not slots._is_host(t) for layer in slots._held for t in layer)
    return own + len(slots._free) + sum(len(f.buffers) for f in slots._fetches.values())


@pytest.mark.parametrize("device", [0, 1])
def test_what_was_fetched_is_there_once_it_is_installed(device: int) -> None:
    slots = Slots(host(), [HERE, HERE], device, spare=4)
    total = buffers(slots)
    for placement in (THERE, HERE, THERE, THERE):
        slots.fetch(1, placement)
        assert held(slots, 1) == wanted(slots, 1)  # until then it goes on with what it has
        assert slots.ready(1)
        slots.install(1)
        assert held(slots, 1) == wanted(slots, 1) and held(slots, 0) == wanted(slots, 0)
        assert {frozenset(d) for d in slots.placement(1).slots} == {frozenset(d) for d in placement.slots}
        assert buffers(slots) == total  # nothing is lost, nothing doubled
    assert slots.done.num_bytes == slots.done.experts * SHAPE.num_bytes and slots.done.failed == 0
    assert slots.placement(0) == HERE
    with pytest.raises(KeyError, match="slot 2 of MoE layer 0 is empty"):
        slots.weights(0, 2)
    slots.close()


def test_only_what_is_missing_is_fetched() -> None:
    slots = Slots(host(), [HERE], 0, spare=4)
    slots.fetch(0, Placement(EXPERTS, ((EMPTY, 1, 2), (0, 2, 3))))
    slots.ready(0)
    slots.install(0)
    assert slots.done.experts == 1
    slots.close()


def test_a_fetch_that_fails_is_counted_and_changes_nothing_or_reads_the_host() -> None:
    def fail(to: torch.Tensor, source: torch.Tensor) -> None:
        raise OSError("planted")

    slots = Slots(host(), [HERE, HERE], 0, spare=4, copy=fail)
    total = buffers(slots)
    slots.fetch(0, THERE)
    assert not slots.ready(0)
    slots.discard(0)
    assert slots.placement(0) == HERE and held(slots, 0) == wanted(slots, 0) and slots.done.failed == 1
    slots.fetch(1, THERE)
    slots.install(1)  # the others count on it
    assert held(slots, 1) == wanted(slots, 1) and set(wanted(slots, 1).values()) == {1.0, 2.0, 3.0}
    assert (slots.done.failed, slots.done.experts) == (2, 0) and buffers(slots) == total
    slots.close()


def test_without_room_it_fails_too() -> None:
    slots = Slots(host(), [Placement(EXPERTS, ((0, 1), (2, 3)))], 0, spare=1)
    slots.fetch(0, Placement(EXPERTS, ((2, 3), (0, 1))))
    assert not slots.ready(0)
    slots.discard(0)
    assert slots.done.failed == 1 and held(slots, 0) == wanted(slots, 0)
    slots.close()


def test_a_newer_fetch_cancels_the_one_before() -> None:
    go, begun = threading.Event(), threading.Event()

    def slow(to: torch.Tensor, source: torch.Tensor) -> None:
        begun.set()
        assert go.wait(10)
        to.copy_(source)

    slots = Slots(host(), [HERE], 0, spare=4, copy=slow)
    total = buffers(slots)
    slots.fetch(0, THERE)
    assert begun.wait(10)
    threading.Timer(0.05, go.set).start()
    slots.fetch(0, HERE)
    assert slots.ready(0)
    slots.install(0)
    assert slots.done.cancelled == 1 and slots.done.experts == 0 and slots.placement(0) == HERE and buffers(slots) == total
    slots.close()


def test_experts_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="is of 5 experts, the model has 4"):
        Slots(host(), [Placement(5, ((0, 1, 2), (3, 4, 0)))], 0, spare=1)
