"""Sums by node: gradients are summed inside of nodes, then between nodes, and then what was summed is handed out inside of nodes.

Along a ring of all ranks, nodes of D ranks each send 2 (N - 1) / N of a tensor to the next node, N ranks in all.  By node each
of a node's ranks has a part of the tensor, which it sums with the ranks at its place of the M other nodes: 2 (M - 1) / M of the
tensor leaves a node, and a message waits for 2 (M - 1) others of other nodes, not for as many as there are ranks.  A
reduce-scatter from everybody to everybody sends D (M - 1) / M of the tensor out of each node, by node (M - 1) / M.  NCCL does
such things inside of one call; gloo doesn't.

Each exchange is some collectives in a row, each of which needs what the one before it gave.  The thread that asks starts the
first, a `Relay` the others.  On each communicator they start in the order in which they were asked for.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from megalina.collective_log import CollectiveLog
from megalina.comm.exchange import Pending, enter
from megalina.comm.urgency import this_thread_is_urgent
from megalina.mesh import Axis, Nodes

Stage = Callable[[], dist.Work | None]  # starts a collective; None: there was nothing to send


class Relayed:
    """Collectives in a row, of which this says what `dist.Work` says of one."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        self._done: Future[None] = Future()

    def wait(self) -> None:
        """Until the last has ended; raises what any of them raised."""
        self._done.result()

    def get_future(self) -> Future[None]:
        return self._done

    def is_completed(self) -> bool:
        return self._done.done()


class Relay:
    """Threads that start the later stages of exchanges once the earlier ones have ended: a thread a stage of an axis, which takes
    exchanges in the order in which they were asked for.  `urgent`: as of `megalina.comm.links.Links`."""

    def __init__(self, *, urgent: bool = False):
        self._urgent = urgent
        self._queues: dict[tuple[str, int], SimpleQueue[tuple[dist.Work | None, Sequence[Stage], Relayed] | None]] = {}
        self._lock = threading.Lock()

    def start(self, key: str, stages: Sequence[Stage]) -> Relayed:
        """The first stage starts here and now.  `key`: exchanges with the same one have the same communicators, and as many
        stages."""
        relayed = Relayed()
        self._hand_on(key, 0, stages[0](), stages[1:], relayed)
        return relayed

    def close(self) -> None:
        """End the threads; what was started must have been awaited."""
        with self._lock:
            for queue in self._queues.values():
                queue.put(None)
            self._queues.clear()

    def _hand_on(self, key: str, stage: int, work: dist.Work | None, later: Sequence[Stage], relayed: Relayed) -> None:
        with self._lock:
            queue = self._queues.get((key, stage))
            if queue is None:
                queue = self._queues[key, stage] = SimpleQueue()
                name = f"{key} stage {stage}"
                threading.Thread(target=self._run, args=(key, stage, queue), name=name, daemon=True).start()
            queue.put((work, later, relayed))

    def _run(self, key: str, stage: int, queue: "SimpleQueue[tuple[dist.Work | None, Sequence[Stage], Relayed] | None]") -> None:
        if self._urgent:
            this_thread_is_urgent()
        while (job := queue.get()) is not None:
            work, later, relayed = job
            job = None  # it holds tensors
            try:
                if work is not None:
                    work.wait()
                if later:
                    self._hand_on(key, stage + 1, later[0](), later[1:], relayed)
            except BaseException as error:  # noqa: BLE001  raised where it is awaited
                relayed.get_future().set_exception(error)
            else:
                if not later:
                    relayed.get_future().set_result(None)
            work = later = relayed = None  # type: ignore[assignment]


def start_sum_by_node(flat: Tensor, axis: Axis, log: CollectiveLog, relay: Relay) -> Pending:
    """`flat` [n] becomes its sum over the ranks of the axis, the same bits on all of them."""
    nodes = axis.nodes
    assert nodes is not None
    inside = nodes.inside.size
    sizes = [len(flat) * (d + 1) // inside - len(flat) * d // inside for d in range(inside)]
    own_size = sizes[nodes.inside.rank]
    even = [own_size] * inside
    parts, own = flat.new_empty(own_size * inside), flat.new_empty(own_size)
    enter(log, "sum", flat, axis)

    def sum_across() -> dist.Work | None:
        torch.sum(parts.view(inside, own_size), 0, out=own)
        return dist.all_reduce(own, group=nodes.across.group, async_op=True) if own_size else None

    stages = (
        lambda: all_to_all(parts, flat, even, sizes, nodes.inside),
        sum_across,
        lambda: all_to_all(flat, own.repeat(inside), sizes, even, nodes.inside_again),
    )
    return Pending(relay.start(f"{axis.log_name} sum", stages), lambda: flat, flat.nbytes)


def start_scatter_by_node(
    flat: Tensor, own: Tensor, sizes: Sequence[int], axis: Axis, log: CollectiveLog, relay: Relay
) -> Pending:
    """`own`, this rank's part of `flat`, becomes its sum over the ranks of the axis; rank r's part has `sizes[r]` elements.  The
    other parts keep this rank's values."""
    nodes = axis.nodes
    assert nodes is not None
    part_of = flat.split(list(sizes))
    by_place = [part_of[row[d]] for d in range(nodes.inside.size) for row in nodes.grid]
    send = _of_places(nodes, sizes)
    own_place = [sizes[row[nodes.inside.rank]] for row in nodes.grid]
    even, own_even = [sum(own_place)] * nodes.inside.size, [len(own)] * len(nodes.grid)
    parts, summed = flat.new_empty(sum(even)), flat.new_empty(sum(own_even))
    enter(log, "scatter", flat, axis)

    def across() -> dist.Work | None:
        return all_to_all(summed, parts.view(nodes.inside.size, -1).sum(0), own_even, own_place, nodes.across)

    stages = (lambda: all_to_all(parts, torch.cat(by_place), even, send, nodes.inside), across)
    relayed = relay.start(f"{axis.log_name} sum", stages)
    return Pending(relayed, lambda: own.copy_(summed.view(len(nodes.grid), -1).sum(0)), flat.nbytes)


def start_gather_by_node(
    flat: Tensor, own: Tensor, sizes: Sequence[int], axis: Axis, log: CollectiveLog, relay: Relay
) -> Pending:
    """`flat` is filled with every rank's `own` part, of which rank r's has `sizes[r]` elements."""
    nodes = axis.nodes
    assert nodes is not None
    receive = [sizes[row[nodes.inside.rank]] for row in nodes.grid]
    even, own_even = [sum(receive)] * nodes.inside.size, [len(own)] * len(nodes.grid)
    of_place, gathered = flat.new_empty(sum(receive)), flat.new_empty(len(flat))
    enter(log, "gather", own if len({*sizes}) == 1 else flat, axis)
    stages = (
        lambda: all_to_all(of_place, own.repeat(len(nodes.grid)), receive, own_even, nodes.across_again),
        lambda: all_to_all(gathered, of_place.repeat(nodes.inside.size), _of_places(nodes, sizes), even, nodes.inside_again),
    )
    part_of = flat.split(list(sizes))
    order = [row[d] for d in range(nodes.inside.size) for row in nodes.grid]

    def put_in_order() -> Tensor:
        for r, values in zip(order, gathered.split([sizes[r] for r in order]), strict=True):
            part_of[r].copy_(values)
        return flat

    return Pending(relay.start(f"{axis.log_name} gather", stages), put_in_order, own.nbytes)


def _of_places(nodes: Nodes, sizes: Sequence[int]) -> list[int]:
    """Elements of all ranks at each place of their nodes."""
    return [sum(sizes[row[d]] for row in nodes.grid) for d in range(nodes.inside.size)]


def all_to_all(out: Tensor, x: Tensor, receive: list[int] | None, send: list[int] | None, axis: Axis) -> dist.Work:
    """Rows from and to each rank of the axis; None: as many each."""
    work: dist.Work = dist.all_to_all_single(out, x, receive, send, group=axis.group, async_op=True)
    return work
