"""Ranks as threads of one process: a wire that copies tensors, in place of torch.distributed's, for tests of many small layouts.

Every group matches its collectives by their number, as gloo does, and messages by their tag."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.comm import exchange
from megalina.layout import EMBEDDING, axis_sizes, rows, rows_across, rows_of_stages
from megalina.mesh import Axis, Mesh

PATIENCE_S = 60.0


class Work:
    def __init__(self, slot: "Slot", finish: Callable[[], None]):
        self._slot, self._finish = slot, finish

    def wait(self) -> None:
        if not self._slot.full.wait(PATIENCE_S):
            raise RuntimeError(f"nobody else came: {self._slot}")
        if self._slot.error:
            raise RuntimeError(self._slot.error)
        self._finish()

    def get_future(self) -> "Work":
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._slot.then(callback)


class Slot:
    """One collective, or one message."""

    def __init__(self, size: int):
        self.size, self.there, self.full, self.error = size, dict[int, tuple[Any, ...]](), threading.Event(), ""
        self._callbacks: list[Callable[[Any], None]] = []
        self._lock = threading.Lock()

    def add(self, rank: int, what: tuple[Any, ...]) -> None:
        with self._lock:
            self.there[rank] = what
            done = len(self.there) == self.size
            if done and len({entry[0] for entry in self.there.values()}) > 1:
                self.error = f"mixed up: {[entry[0] for entry in self.there.values()]}"
            callbacks, self._callbacks = (self._callbacks, []) if done else ([], self._callbacks)
        if done:
            self.full.set()
            for callback in callbacks:
                callback(None)

    def then(self, callback: Callable[[Any], None]) -> None:
        with self._lock:
            if not self.full.is_set():
                self._callbacks.append(callback)
                return
        callback(None)


class Group:
    def __init__(self, ranks: Sequence[int]):
        self.ranks = list(ranks)
        self._lock = threading.Lock()
        self._slots: dict[Any, Slot] = {}
        self._counts: dict[Any, int] = defaultdict(int)

    def slot(self, rank: int, name: Any = None, size: int = 0) -> Slot:
        with self._lock:
            number = self._counts[rank, name]
            self._counts[rank, name] += 1
            return self._slots.setdefault((name, number), Slot(size or len(self.ranks)))


class _End:
    """A group as one rank has it."""

    def __init__(self, group: Group, rank: int):
        self.group, self.rank = group, rank

    @property
    def place(self) -> int:
        return self.group.ranks.index(self.rank)


class Wire:
    """What `megalina.comm.exchange` calls of torch.distributed."""

    ReduceOp = torch.distributed.ReduceOp

    def _all(self, kind: str, given: Any, group: _End, finish: Callable[[dict[int, Any]], None]) -> Work:
        slot = group.group.slot(group.rank)
        slot.add(group.place, (kind, given))
        return Work(slot, lambda: finish({place: entry[1] for place, entry in slot.there.items()}))

    def all_reduce(self, x: Tensor, op: Any = torch.distributed.ReduceOp.SUM, *, group: _End, async_op: bool) -> Work:
        largest = op == torch.distributed.ReduceOp.MAX

        def finish(parts: dict[int, Tensor]) -> None:
            stacked = torch.stack([parts[place] for place in sorted(parts)])
            x.copy_(stacked.amax(0) if largest else stacked.sum(0))

        return self._all("max" if largest else "sum", x.detach().clone(), group, finish)

    def all_to_all_single(
        self, out: Tensor, x: Tensor, receive: Any = None, send: Any = None, *, group: _End, async_op: bool
    ) -> Work:
        size = len(group.group.ranks)
        sizes = send if send is not None else [len(x) // size] * size
        parts = [part.clone() for part in x.detach().split(sizes)]

        def finish(given: dict[int, list[Tensor]]) -> None:
            out.copy_(torch.cat([given[place][group.place] for place in range(size)]))

        return self._all("all-to-all", parts, group, finish)

    def all_gather_into_tensor(self, out: Tensor, x: Tensor, *, group: _End, async_op: bool) -> Work:
        def finish(given: dict[int, Tensor]) -> None:
            out.copy_(torch.cat([given[place] for place in range(len(given))]).view(out.shape))

        return self._all("gather", x.detach().clone(), group, finish)

    def isend(self, x: Tensor, other: int, *, group: _End, tag: int) -> Work:
        slot = group.group.slot(group.rank, (group.rank, other, tag), 2)
        slot.add(0, ("message", x.detach().clone()))
        return Work(slot, lambda: None)

    def irecv(self, out: Tensor, other: int, *, group: _End, tag: int) -> Work:
        slot = group.group.slot(group.rank, (other, group.rank, tag), 2)
        slot.add(1, ("message", None))

        def finish() -> None:
            out.copy_(slot.there[0][1])

        return Work(slot, finish)


def meshes(
    world: int, *, tp: int, ep: int, cp: int = 1, pp: int, across: Mapping[str, tuple[int, ...]], packing: int = 1
) -> list[Mesh]:
    """Of each rank."""
    shape = axis_sizes(world // pp, tp=tp, ep=ep, cp=cp, packing=packing)
    table = rows_of_stages(shape, pp) if pp > 1 else rows(shape)
    more = {name: rows_across(shape, members, "dp" if name == EMBEDDING else "") for name, members in across.items()}
    made = {(name, tuple(row)): Group(row) for name, of in (table | more).items() for row in of}

    def axis(name: str, rank: int, of: list[list[int]]) -> Axis | None:
        row = next((tuple(row) for row in of if rank in row), None)
        if row is None:
            return None
        group = _End(made[name, row], rank) if len(row) > 1 else None
        packed = packing if name in ("ep", "counts", "edp", "copies") else 1
        return Axis(name, row, row.index(rank), group, packed)  # type: ignore[arg-type]

    out = []
    for rank in range(world):
        along = {name: axis(name, rank, of) for name, of in more.items()}
        along |= {"stage": axis("stage", rank, table["stage"])} if pp > 1 else {}
        own = {
            "along_stages": {name: a for name, a in along.items() if a is not None},
            "pp": pp,
            "pp_rank": rank // (world // pp),
        }
        axes = {name: axis(name, rank, of) for name, of in table.items() if name != "stage"}
        out.append(Mesh(**axes, **own))  # type: ignore[arg-type]
    return out


@contextmanager
def wire():
    """`megalina.comm.exchange` talks to threads."""
    made = Wire()
    before = exchange.dist, exchange._all_gather, exchange.is_gloo
    exchange.dist, exchange._all_gather, exchange.is_gloo = made, made.all_gather_into_tensor, lambda group: True
    try:
        yield
    finally:
        exchange.dist, exchange._all_gather, exchange.is_gloo = before


def on_threads(ranks: int, function: Callable[[int], Any]) -> list[Any]:
    """What `function(rank)` returns on each; the first error is raised."""
    out: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            out[rank] = function(rank)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=partial(run, rank), daemon=True) for rank in range(ranks)]
    with wire():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S + 5)
            if errors:
                raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "some ranks stand still"
    return out
