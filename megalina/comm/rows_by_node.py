"""Rows by node: each goes to the rank at the sender's place on another node, which passes it on there, and back the same way.

Outward: an all-to-all between ranks at one place, then, the first time, one of numbers of rows inside of each node, then one of
rows inside of nodes.  Back: inside of nodes, where what belongs to one row is summed, then between ranks at one place.  See
`megalina.comm.by_node` for how collectives in a row keep their order; each of these has communicators of its own."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalina.collective_log import CollectiveLog
from megalina.comm.by_node import Relay, all_to_all
from megalina.comm.exchange import Pending, enter
from megalina.mesh import Axis

Count = Callable[[Axis, Sequence[int], int], None]  # of rows sent to each rank of an axis, and the bytes of one


class Way(Protocol):
    """What a rank passes on, and to whom: the same for an exchange to the experts, the one back, and their gradients'.

    `send_P`: rows to each rank of the node; `receive_P`: from each, [] while nobody has told."""

    send_P: list[int]
    receive_P: list[int]

    def spread(self, arrived_AC: Tensor) -> Tensor:
        """Rows that are passed on, for rank after rank of the node; sets `send_P`."""
        ...

    def gathered(self, back_VC: Tensor) -> Tensor:
        """The sum of what comes back for each row."""
        ...


def start_rows_outward(
    x: Tensor, send: list[int], receive: list[int], way: Way, axis: Axis, log: CollectiveLog, relay: Relay, count: Count | None
) -> Pending:
    """Rows `x`, the next `send[m]` of them to node m of the axis, of which `receive[m]` come to be passed on; arrives as what
    ranks of this node pass on to this one, rank after rank."""
    nodes = axis.nodes
    assert nodes is not None and nodes.counts is not None
    x = x.contiguous()
    arrived = x.new_empty(sum(receive), x.shape[1])
    sent_on = came = counts = x.new_empty(0, 0)
    enter(log, "all-to-all", x, nodes.across, send, receive)
    if count is not None:
        count(nodes.across, send, _row_bytes(x))

    def tell() -> dist.Work | None:
        nonlocal sent_on, counts
        sent_on = way.spread(arrived)
        if count is not None:
            count(nodes.inside, way.send_P, _row_bytes(sent_on))
        if way.receive_P:
            return None
        assert nodes.counts is not None
        told = torch.tensor(way.send_P)
        counts = torch.empty_like(told)
        return all_to_all(counts, told, None, None, nodes.counts)

    def pass_on() -> dist.Work | None:
        nonlocal came
        way.receive_P = way.receive_P or counts.tolist()
        came = sent_on.new_empty(sum(way.receive_P), sent_on.shape[1])
        return all_to_all(came, sent_on, way.receive_P, way.send_P, nodes.inside)

    stages = (lambda: all_to_all(arrived, x, receive, send, nodes.across), tell, pass_on)
    return Pending(relay.start(f"{axis.log_name} outward", stages), lambda: came, _bytes_out(x, send, receive, nodes.across))


def start_rows_back(
    y: Tensor, send: list[int], receive: list[int], way: Way, axis: Axis, log: CollectiveLog, relay: Relay, count: Count | None
) -> Pending:
    """What became of the rows that `start_rows_outward` brought the same `way`, in their order; arrives as sums of what became of
    the rows that were sent, in their order, `receive[m]` of node m.  `send[m]`: what this rank was asked by node m to pass on."""
    nodes = axis.nodes
    assert nodes is not None
    y = y.contiguous()
    back = y.new_empty(sum(way.send_P), y.shape[1])
    out = y.new_empty(0, 0)
    enter(log, "all-to-all", y, nodes.inside_again, way.receive_P, way.send_P)
    if count is not None:
        count(nodes.inside_again, way.receive_P, _row_bytes(y))

    def across() -> dist.Work | None:
        nonlocal out
        summed = way.gathered(back)
        if count is not None:
            count(nodes.across_again, send, _row_bytes(summed))
        out = summed.new_empty(sum(receive), summed.shape[1])
        return all_to_all(out, summed, receive, send, nodes.across_again)

    stages = (lambda: all_to_all(back, y, way.send_P, way.receive_P, nodes.inside_again), across)
    return Pending(relay.start(f"{axis.log_name} back", stages), lambda: out, _bytes_out(y, send, receive, nodes.across_again))


def _bytes_out(x: Tensor, send: list[int], receive: list[int], across: Axis) -> int:
    """What leaves this rank for other nodes, or comes from there, if that is more."""
    return (max(sum(send), sum(receive)) - send[across.rank]) * _row_bytes(x)


def _row_bytes(x: Tensor) -> int:
    return x.element_size() * x.shape[1]
