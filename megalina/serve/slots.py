"""Slots: the places for experts on this device, filled from host memory behind the computation (Lina, section 6.2).

Each MoE layer has its own slots.  What is fetched lies in spare places until it is installed, so the layer goes on with what
it has until then: a fetch may be cancelled, or fail, and nothing is lost.

On CUDA a fetch is done when its copies have been asked for.  `install` makes the computation wait for them, not the host.
"""

import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalina.placement.placement import EMPTY, Placement, aligned, moved_slots
from megalina.serve.host_experts import ExpertStream, HostExperts

logger = logging.getLogger("megalina")
Copy = Callable[[Tensor, Tensor], object]


def copy_behind(to: Tensor, source: Tensor) -> None:
    """On CUDA the host does not wait for it."""
    to.copy_(source, non_blocking=True)


@dataclass(slots=True)
class Fetched:
    """What slots have done so far; exact."""

    experts: int = 0  # brought into a slot
    num_bytes: int = 0
    cancelled: int = 0  # fetches that something newer took the place of
    failed: int = 0  # fetches that raised, or had no room
    waited_s: float = 0.0  # the computation stood still for them


@dataclass(slots=True)
class _Fetch:
    placement: Placement  # slots in the order in which they will be
    wanted: list[tuple[int, int]]  # (slot, expert)
    buffers: dict[int, Tensor] = field(default_factory=dict)  # by slot
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    cancelled: bool = False
    begun: torch.cuda.Event | None = None  # where the computation was then
    copies: torch.cuda.Event | None = None


class Slots:
    """`placements`: of each MoE layer; `device`: this one's place in them.

    `spare`: experts that may be on their way at a time, over all layers.  `stream`: on CUDA, the one on which they come; None:
    slots are on the CPU.  ValueError where a placement is of other experts."""

    def __init__(
        self,
        host: HostExperts,
        placements: Sequence[Placement],
        device: int,
        *,
        spare: int,
        copy: Copy = copy_behind,
        stream: ExpertStream | None = None,
    ):
        for layer, placement in enumerate(placements):
            if placement.num_experts != host.num_experts:
                raise ValueError(
                    f"layer {layer}'s placement is of {placement.num_experts} experts, the model has {host.num_experts}"
                )
        self.host, self.device, self.done = host, device, Fetched()
        self.copy = copy
        self._spare, self._stream = spare, stream
        where = torch.device("cpu") if stream is None else stream.device
        self._placements = list(placements)
        self._held: list[list[Tensor | None]] = []
        for layer, placement in enumerate(placements):
            experts = placement.slots[device]
            self._held.append([None if e == EMPTY else host.expert(layer, e).to(where, copy=True) for e in experts])
        empty = sum(t is None for held in self._held for t in held)
        places = spare + empty if host.num_layers else 0
        self._free = [torch.empty(host.shape.numel, dtype=host.shape.dtype, device=where) for _ in range(places)]
        self._fetches: dict[int, _Fetch] = {}
        self._queue: deque[tuple[int, _Fetch]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def placement(self, layer: int) -> Placement:
        """Where this layer's experts sit now, on all devices."""
        return self._placements[layer]

    def weights(self, layer: int, slot: int) -> dict[str, Tensor]:
        """The tensors of the expert in a slot; KeyError for an empty one."""
        flat = self._held[layer][slot]
        if flat is None:
            raise KeyError(f"slot {slot} of MoE layer {layer} is empty")
        return self.host.shape.views(flat)

    def fetch(self, layer: int, placement: Placement) -> None:
        """Begin to bring what this device lacks for a placement.  One that was begun for the layer before is cancelled."""
        self.discard(layer)
        target = aligned(self._placements[layer], placement)
        wanted = moved_slots(self._placements[layer], target, self.device)
        fetch = _Fetch(target, wanted)
        self._fetches[layer] = fetch
        if not wanted:
            fetch.done.set()
            return
        if self._stream is not None:
            fetch.begun = self._stream.mark()
        room = self._spare - sum(len(f.buffers) for f in self._fetches.values())  # places for empty slots are no room
        with self._wake:
            if room < len(wanted):
                fetch.error = MemoryError(f"{len(wanted)} experts to fetch, room for {room}")
                fetch.done.set()
                return
            fetch.buffers = {slot: self._free.pop() for slot, _ in wanted}
            self._queue.append((layer, fetch))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fetch experts", daemon=True)
                self._thread.start()
            self._wake.notify()

    def fingerprint(self, layer: int) -> float:
        """A number that tells the layer's next placement from others: where ranks' numbers differ, so do their plans."""
        fetch = self._fetches.get(layer)
        placement = self._placements[layer] if fetch is None else fetch.placement
        return float(zlib.crc32(repr(placement.slots).encode()))

    def ready(self, layer: int) -> bool:
        """Wait for what was begun; whether all of it came.  True, too, where nothing was begun."""
        fetch = self._fetches.get(layer)
        if fetch is None:
            return True
        began_s = time.perf_counter()
        fetch.done.wait()
        self.done.waited_s += time.perf_counter() - began_s
        return fetch.error is None

    def install(self, layer: int) -> None:
        """From now on the layer sits as was fetched.  What did not come is taken from host memory, slowly, and counted."""
        fetch = self._fetches.pop(layer, None)
        if fetch is None:
            return
        fetch.done.wait()
        held = self._held[layer]
        if self._stream is not None and fetch.copies is not None:
            self._stream.hold(fetch.copies)
        if fetch.error is not None:
            self._count_failure(layer, fetch)
            with self._wake:
                self._free += fetch.buffers.values()
        for slot, expert in fetch.wanted:
            self._give_back(held[slot])
            held[slot] = fetch.buffers[slot] if fetch.error is None else self._at_once(layer, expert)
        for slot, expert in enumerate(fetch.placement.slots[self.device]):
            if expert == EMPTY and held[slot] is not None:
                self._give_back(held[slot])
                held[slot] = None
        self._placements[layer] = fetch.placement
        if fetch.error is None:
            self.done.experts += len(fetch.wanted)
            self.done.num_bytes += len(fetch.wanted) * self.host.shape.num_bytes

    def discard(self, layer: int) -> None:
        """The layer stays as it is; what was on its way is given up."""
        fetch = self._fetches.pop(layer, None)
        if fetch is None:
            return
        fetch.cancelled = True
        fetch.done.wait()
        if fetch.error is not None:
            self._count_failure(layer, fetch)
        elif fetch.wanted:
            self.done.cancelled += 1
        with self._wake:
            self._free += fetch.buffers.values()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        if self._stream is not None:
            self._stream.synchronize()

    def _at_once(self, layer: int, expert: int) -> Tensor:
        """Host memory itself, or on CUDA a place that is filled before anything else is computed."""
        if self._stream is None:
            return self.host.expert(layer, expert)
        self._stream.synchronize()  # a fetch that was given up may still write there
        with self._wake:
            place = self._free.pop()  # there is one: what the slot had, or the place of an empty slot
        return place.copy_(self.host.expert(layer, expert))

    def _count_failure(self, layer: int, fetch: _Fetch) -> None:
        self.done.failed += 1
        logger.warning("experts of MoE layer %d did not come (%s); answers stay as they are", layer, fetch.error)

    def _give_back(self, buffer: Tensor | None) -> None:
        """To the free buffers, of which host memory is none."""
        if buffer is not None and not self._is_host(buffer):
            with self._wake:
                self._free.append(buffer)

    def _is_host(self, buffer: Tensor) -> bool:
        return buffer.untyped_storage().data_ptr() == self.host.storage_ptr

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue:
                    if self._closed:
                        return
                    self._wake.wait()
                layer, fetch = self._queue.popleft()
            behind = nullcontext() if self._stream is None or fetch.begun is None else self._stream.after(fetch.begun)
            try:
                with torch.inference_mode(), behind:
                    for slot, expert in fetch.wanted:
                        if fetch.cancelled:
                            break
                        self.copy(fetch.buffers[slot], self.host.expert(layer, expert))
            except Exception as error:  # noqa: BLE001  raised where it is awaited, which decides what is done instead
                fetch.error = error
            finally:
                if self._stream is not None:
                    fetch.copies = self._stream.asked()
                fetch.done.set()
