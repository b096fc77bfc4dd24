"""Bounds: what no schedule of a step can beat on given devices and links."""

from collections.abc import Callable, Mapping, Sequence

from megalina.layout import rows
from megalina.perfmodel.sim.lower_bound import lower_bound
from megalina.perfmodel.sim.network import one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import Instruction, Kind, Program
from megalina.timeline.recorder import SEND, Event


def link_bytes(by_rank: Sequence[Sequence[Event]], shape: Mapping[str, int], *, ranks_per_node: int, sharded: bool) -> float:
    """What a step puts on the busiest node's link, out of it: all ranks' events of one step.

    All-to-alls count with the share of the ranks that are on other nodes, as if all got equally many; sums as a ring
    (2 (n - 1) / n of the value over each edge), gathers and scatters as half of one.  Inside a node nothing counts."""
    table = rows(dict(shape))
    out_bytes: dict[int, float] = {}
    for rank, events in enumerate(by_rank):
        node = rank // ranks_per_node
        for e in events:
            if e.kind != SEND:
                continue
            row = next(row for row in table[e.axis.partition("/")[0]] if rank in row)
            n = len(row)
            if e.op in ("tokens", "counts"):
                sent = e.num_bytes * sum(other // ranks_per_node != node for other in row) / (n - 1)
            else:
                after = row[(row.index(rank) + 1) % n]
                sent = _over_an_edge(e, n, sharded) if after // ranks_per_node != node else 0.0
            out_bytes[node] = out_bytes.get(node, 0.0) + sent
    return max(out_bytes.values(), default=0.0)


def _over_an_edge(event: Event, ranks: int, sharded: bool) -> float:
    if event.op in ("gather", "params"):
        return event.num_bytes * (ranks - 1)  # each rank's own part goes round
    if event.op == "scatter" or (event.op == "grads" and sharded):
        return event.num_bytes * (ranks - 1) / ranks
    return 2 * event.num_bytes * (ranks - 1) / ranks


def bounds_of(
    program: Program,
    events: Sequence[Event],
    *,
    seconds: Callable[[Instruction], float],
    ranks: int,
    link_bytes_per_s: float,
) -> dict[str, float]:
    """compute_s: the device; critical_path_s: the longest chain of instructions of this very list that need each other, with the
    whole link for each exchange.  All ranks are taken to be alike; `events`: of one rank, for the bytes."""
    sent = {e.tag: e.num_bytes for e in events if e.kind == SEND}

    def whole_bytes(instruction: Instruction) -> float:
        size = sent.get(instruction.tag, 0)
        return size * ranks / (ranks - 1) if instruction.op is not None and instruction.op.name in ("TOKENS", "COUNTS") else size

    found = lower_bound(
        [program],
        ranks_of=lambda axis, rank: tuple(range(ranks)),
        seconds=lambda rank, instruction: seconds(instruction) if instruction.kind is Kind.COMPUTE else 0.0,
        network=one_level(link_bytes_per_s, 0.0),
        sizes=Sizes(whole_bytes),
    )
    return {"compute_s": found["compute_s"], "critical_path_s": found["critical_path_s"]}
