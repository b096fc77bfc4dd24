"""Hierarchical: experts to nodes first, then replicas and devices inside each node (EPLB's hierarchical mode).

Replicas of an expert sit inside one node, so bytes of experts need not travel between nodes when replicas change, and rows of
an expert go to one node alone.  Only an expert whose load passes a node's fair share sits on more nodes: one node could never
do its work.  The price against `greedy` is a coarser balance.  Assumes an even split over replicas.

Shapes: E experts.
"""

from collections.abc import Callable
from functools import partial
from math import ceil

from megalina.placement.placement import EMPTY, Placement, scaled_share
from megalina.placement.planners.greedy import MAX_EXCHANGES, exchange, packed, replicas
from megalina.placement.predictors.predictor import Floats

ROUNDING_ERROR = 1e-9  # of a node: an expert with just a node's fair share stays on one


def hierarchical(share_E: Floats, num_devices: int, slots_per_device: int, *, devices_per_node: int) -> Placement:
    """The placement for an expected share of rows [E]; device d is on node d // devices_per_node; all zero means uniform.

    With one node this is `greedy`.  ValueError where experts lack room, or nodes would differ in their number of devices."""
    load_E = scaled_share(share_E, num_devices, slots_per_device).tolist()
    if devices_per_node < 1 or num_devices % devices_per_node:
        raise ValueError(f"{num_devices} devices in nodes of {devices_per_node}: devices_per_node must divide num_devices")
    num_nodes, slots_per_node = num_devices // devices_per_node, devices_per_node * slots_per_device
    nodes_E = _nodes(load_E, num_nodes, num_nodes * slots_per_node - len(load_E))
    on_node_E = [load / nodes for load, nodes in zip(load_E, nodes_E, strict=True)]
    nodes = packed(load_E, nodes_E, num_nodes, slots_per_node)  # exchanges between nodes were not worth their time
    slots = []
    for node in nodes:
        experts = sorted(node)
        loads = [on_node_E[e] for e in experts]
        counts = replicas(loads, devices_per_node, slots_per_node)
        devices = packed(loads, counts, devices_per_node, slots_per_device)
        exchange(devices, [load / n for load, n in zip(loads, counts, strict=True)], slots_per_device, MAX_EXCHANGES)
        slots += [(*(experts[i] for i in d), *[EMPTY] * (slots_per_device - len(d))) for d in devices]
    return Placement(len(load_E), tuple(slots))


def by_node(devices_per_node: int) -> Callable[[Floats, int, int], Placement]:
    """`hierarchical` as a planner like the others."""
    return partial(hierarchical, devices_per_node=devices_per_node)


def _nodes(load_E: list[float], num_nodes: int, spare: int) -> list[int]:
    """How many nodes each expert sits on, where `spare` slots may go to second and further nodes; the most loaded first."""
    nodes_E = [1] * len(load_E)
    for expert in sorted(range(len(load_E)), key=lambda e: (-load_E[e], e)):
        more = min(ceil(load_E[expert] * num_nodes - ROUNDING_ERROR) - 1, num_nodes - 1, spare)
        if more <= 0:
            break
        nodes_E[expert] += more
        spare -= more
    return nodes_E
