"""Expert order: in which order the experts of each MoE layer lie on the ranks that share them out, so that those that the tokens
of a node choose are on it.

A rank holds a block of the order; the blocks of a node's ranks are neighbours.  A sequence is at home on node (number mod nodes),
as in LocMoE (Li et al. 2024).  Where sequences of all nodes choose alike, no order is better than another.

The file is JSON: {"num_experts": 8, "nodes": 2, "layers": {"0": [5, 0, ...], ...}}, of each MoE layer all experts in their order.

L MoE layers, N nodes, E experts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.routing_trace import RoutingTrace
from megalina.whole_file import whole

Counts = NDArray[np.int64]
Order = tuple[int, ...]  # the expert in each place


@dataclass(frozen=True, slots=True)
class ExpertOrders:
    """ValueError unless each layer's order has each expert once, and nodes hold equally many."""

    num_experts: int
    nodes: int
    layers: Mapping[int, Order]  # of the model -> its order

    def __post_init__(self) -> None:
        if not self.layers or self.nodes < 1 or self.num_experts % self.nodes:
            raise ValueError(
                f"an order of {len(self.layers)} layers and {self.num_experts} experts on {self.nodes} nodes: there must be a "
                "layer, and nodes must hold equally many experts"
            )
        for layer, order in self.layers.items():
            if sorted(order) != list(range(self.num_experts)):
                raise ValueError(f"layer {layer}: the order must have each of experts 0 to {self.num_experts - 1} once: {order}")

    def stays(self, nodes: int) -> bool:
        """Whether each expert is on the one of so many nodes where it is without an order."""
        pairs = ((place, expert) for order in self.layers.values() for place, expert in enumerate(order))
        return all(place * nodes // self.num_experts == expert * nodes // self.num_experts for place, expert in pairs)


def read_orders(path: Path) -> ExpertOrders:
    """ValueError, in one line, where there is no such file or it isn't one."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        layers = {int(layer): tuple(int(expert) for expert in order) for layer, order in found["layers"].items()}
        return ExpertOrders(int(found["num_experts"]), int(found["nodes"]), layers)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no order of experts, as tools/place_experts.py writes one: {error}") from error


def write_orders(path: Path, orders: ExpertOrders) -> None:
    found = {
        "num_experts": orders.num_experts,
        "nodes": orders.nodes,
        "layers": {str(layer): list(order) for layer, order in orders.layers.items()},
    }
    with whole(path, durable=True) as aside:
        aside.write_text(json.dumps(found) + "\n")


def counts_of(trace: RoutingTrace, nodes: int) -> Counts:
    """[L, N, E]: choices of each expert by tokens whose sequence is at home on a node.

    ValueError where the trace doesn't say which sequences it is of."""
    if trace.samples_S is None:
        raise ValueError(
            f"trace {trace.name} has no numbers of its sequences, so nobody knows where they are at home: record it anew"
        )
    home_T = np.repeat(trace.samples_S.astype(np.int64) % nodes, trace.sample_lengths_S.astype(np.int64))
    out = np.zeros((trace.num_layers, nodes, trace.num_experts), dtype=np.int64)
    for layer in range(trace.num_layers):
        ids_TK = trace.expert_ids_TLK[:, layer].astype(np.int64)
        flat = home_T[:, None] * trace.num_experts + ids_TK
        out[layer] = np.bincount(flat.ravel(), minlength=nodes * trace.num_experts).reshape(nodes, -1)
    return out


def order_of(count_NE: Counts, ranks_per_node: int) -> Order:
    """An order with as many choices as possible at home: the best for two nodes; for more, one that exchanging no two experts
    makes better.  Within a node busy experts are spread over its ranks.

    ValueError unless ranks hold equally many experts."""
    nodes, num_experts = count_NE.shape
    if num_experts % (nodes * ranks_per_node):
        raise ValueError(f"{num_experts} experts can't be cut into {nodes} nodes of {ranks_per_node} ranks: take a divisor")
    return tuple(e for node in _nodes(count_NE) for rank in _ranks(node, count_NE.sum(0), ranks_per_node) for e in rank)


def local_share(count_NE: Counts, order: Order) -> float:
    """Of all choices, those of an expert on the token's own node."""
    nodes, num_experts = count_NE.shape
    node_E = np.empty(num_experts, dtype=np.int64)
    node_E[list(order)] = np.arange(num_experts) * nodes // num_experts
    return float(count_NE[node_E, np.arange(num_experts)].sum() / max(count_NE.sum(), 1))


def _nodes(count_NE: Counts) -> list[list[int]]:
    """The experts of each node."""
    nodes, num_experts = count_NE.shape
    held: list[list[int]] = [[] for _ in range(nodes)]
    gain_E = count_NE.max(0) - count_NE.mean(0)
    for e in np.argsort(-gain_E, kind="stable").tolist():  # who has most to lose chooses first
        open_nodes = [n for n in range(nodes) if len(held[n]) < num_experts // nodes]
        held[max(open_nodes, key=lambda n: (count_NE[n, e], -n))].append(e)
    while (better := _exchange(count_NE, held)) is not None:
        a, i, b, j = better
        held[a][i], held[b][j] = held[b][j], held[a][i]
    return held


def _exchange(count_NE: Counts, held: list[list[int]]) -> tuple[int, int, int, int] | None:
    """Two experts (node, place; node, place) that should change places; None: nobody gains."""
    for a in range(len(held)):
        for b in range(a + 1, len(held)):
            gain_i = count_NE[b, held[a]] - count_NE[a, held[a]]
            gain_j = count_NE[a, held[b]] - count_NE[b, held[b]]
            i, j = int(gain_i.argmax()), int(gain_j.argmax())
            if gain_i[i] + gain_j[j] > 0:
                return a, i, b, j
    return None


def _ranks(experts: list[int], load_E: Counts, ranks: int) -> list[list[int]]:
    """A node's experts on its ranks: busy ones first, each to the rank with room that has least to do."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for e in sorted(experts, key=lambda e: (-load_E[e], e)):
        free = [rank for rank in held if len(rank) < len(experts) // ranks]
        min(free, key=lambda rank: load_E[rank].sum()).append(e)
    return [sorted(rank) for rank in held]
