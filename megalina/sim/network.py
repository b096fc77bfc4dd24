"""The network: links over a hierarchy of devices, nodes and groups of nodes, and what collectives put on them.

Every device has a port into its fast domain (NVLink, PCIe), every node network cards, and groups of nodes may hang on a switch
core that is too small for all of them at once.  All links carry both ways at once.

Letters: L links, F flows, B bundles, I places of bundles on links.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalina.sim.collectives import ALGORITHMS, ALL_TO_ALLS, Collective, Floats, Ints, Phase, phases_of
from megalina.step.program import Op

SHARES = ("flow", "collective")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Topology, rates (bytes a second, each way; inf: never the limit) and how it is used.

    `share`: what divides a link evenly.  flow: each flow, as TCP does, so an all-to-all of many flows loses little to a ring of
    one.  collective: each collective, whose flows keep pace with one another.  ValueError for what can't be."""

    nic_bytes_per_s: float
    ranks_per_node: int = 1  # devices of a fast domain
    nics_per_node: int = 1
    fast_bytes_per_s: float = math.inf  # a device's port
    nic_behind_port: bool = False  # what leaves a node goes through the device's port too (PCIe)
    nodes_per_group: int = 0  # nodes below one port of the core; 0: no core
    oversubscription: float = 1.0  # a group's cards over what the core takes from it
    latency_s: float = 0.0  # of each collective, whatever its size
    hop_s: float = 0.0  # of each step between nodes
    fast_hop_s: float = 0.0  # of each step inside a node
    algorithm: str = "ring"  # of all but all-to-alls, see `phases_of`
    all_to_all: str = "direct"
    rings: int = 1
    share: str = "flow"
    first: tuple[tuple[Op, ...], ...] = ()  # classes that come first, strictly, in this order; all else comes last

    def __post_init__(self) -> None:
        for name in ("nic_bytes_per_s", "fast_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: give bytes a second above 0")
        for name in ("latency_s", "hop_s", "fast_hop_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name):g}: give seconds, 0 or more")
        if not (1 <= self.nics_per_node <= self.ranks_per_node):
            raise ValueError(f"nics_per_node ({self.nics_per_node}) must be 1 to ranks_per_node ({self.ranks_per_node})")
        if not (1 <= self.rings <= self.ranks_per_node):
            raise ValueError(f"rings ({self.rings}) must be 1 to ranks_per_node ({self.ranks_per_node})")
        if self.nodes_per_group < 0 or not 1 <= self.oversubscription < math.inf:
            numbers = f"nodes_per_group is {self.nodes_per_group}, oversubscription {self.oversubscription:g}"
            raise ValueError(f"{numbers}: give 0 or more nodes, and 1 or more")
        for name, known in (("algorithm", ALGORITHMS), ("all_to_all", ALL_TO_ALLS), ("share", SHARES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}")

    def urgency(self, op: Op) -> int:
        return next((i for i, ops in enumerate(self.first) if op in ops), len(self.first))

    def capacities(self, ranks: int) -> Floats:
        """Of all links: ports out, ports in, cards out, cards in, the core's ports up, down."""
        nodes = -(-ranks // self.ranks_per_node)
        groups = -(-nodes // self.nodes_per_group) if self.nodes_per_group else 0
        core_bytes_per_s = self.nodes_per_group * self.nics_per_node * self.nic_bytes_per_s / self.oversubscription
        sizes = (ranks, nodes * self.nics_per_node, groups)
        rates = (self.fast_bytes_per_s, self.nic_bytes_per_s, core_bytes_per_s)
        return np.concatenate([np.full(2 * size, rate) for size, rate in zip(sizes, rates, strict=True)])

    def phases(self, what: Collective, ranks: Sequence[int], bytes_NN: Floats | None = None) -> tuple[Phase, ...]:
        return phases_of(
            what,
            ranks,
            ranks_per_node=self.ranks_per_node,
            algorithm=self.all_to_all if what is Collective.ALL_TO_ALL else self.algorithm,
            rings=self.rings,
            bytes_NN=bytes_NN,
        )


def one_level(bytes_per_s: float, latency_s: float) -> Network:
    """Every rank has a link of its own, which collectives share evenly; everybody sends to everybody."""
    return Network(nic_bytes_per_s=bytes_per_s, latency_s=latency_s, algorithm="direct", share="collective")


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """A phase of a collective on the links, for a tensor of one byte.  A bundle: flows of the same way and size, or, where
    collectives share, all flows of the phase."""

    amount_B: Floats  # bytes of one flow; or the seconds that the phase takes alone
    bundle_I: Ints
    link_I: Ints
    weight_I: Floats  # what a rate of one takes of the link
    latency_s: float  # after the last byte

    def bytes_on(self, links: int) -> Floats:
        """On each link, for a tensor of one byte."""
        return np.bincount(self.link_I, self.weight_I * self.amount_B[self.bundle_I], links).astype(float)


class Loads:
    """What collectives put on the links of `ranks` ranks.  Those of a group are worked out once."""

    def __init__(self, network: Network, ranks: int):
        self.network = network
        self.ranks = ranks
        self.capacity_L = network.capacities(ranks)
        self._found: dict[tuple[Collective, tuple[int, ...]], tuple[Load, ...]] = {}

    def of(self, axis: str, what: Collective, ranks: tuple[int, ...], bytes_NN: Floats | None = None) -> tuple[Load, ...]:
        """Of each phase, in their order.  With `bytes_NN` not for one byte, but for just these."""
        if bytes_NN is not None:
            return self._loads(what, ranks, bytes_NN)
        if (what, ranks) not in self._found:
            self._found[what, ranks] = self._loads(what, ranks, None)
        return self._found[what, ranks]

    def alone_s(self, loads: Sequence[Load], num_bytes: float) -> float:
        """What a collective can't be faster than with nothing else on the wire."""
        links = len(self.capacity_L)
        return sum(float((load.bytes_on(links) / self.capacity_L).max()) * num_bytes + load.latency_s for load in loads)

    def _loads(self, what: Collective, ranks: tuple[int, ...], bytes_NN: Floats | None) -> tuple[Load, ...]:
        phases = self.network.phases(what, ranks, bytes_NN)
        return tuple(self._load(phase, last=phase is phases[-1]) for phase in phases)

    def _load(self, phase: Phase, *, last: bool) -> Load:
        network = self.network
        latency_s = phase.hops * network.hop_s + phase.fast_hops * network.fast_hop_s + (network.latency_s if last else 0.0)
        way_FP = self._ways(phase.source_F, phase.target_F)
        limited_F = (way_FP >= 0).any(1)  # the others take no time
        way_FP, bytes_F = way_FP[limited_F], phase.bytes_F[limited_F]
        if network.share == "collective" and len(bytes_F):
            bytes_L = np.zeros(len(self.capacity_L))
            for way_F in way_FP.T:
                bytes_L += np.bincount(way_F[way_F >= 0], bytes_F[way_F >= 0], len(bytes_L))
            alone_s = (bytes_L / self.capacity_L).max()
            on = np.flatnonzero(bytes_L)
            return Load(np.array([alone_s]), np.zeros(len(on), int), on, bytes_L[on] / alone_s, latency_s)
        first_B, bundle_F, count_B = _bundles(way_FP, bytes_F)
        way_BP = way_FP[first_B]
        bundle_I, place_I = np.nonzero(way_BP >= 0)
        return Load(bytes_F[first_B], bundle_I, way_BP[bundle_I, place_I], count_B[bundle_I].astype(float), latency_s)

    def _ways(self, source_F: Ints, target_F: Ints) -> Ints:
        """The links that each flow crosses, -1 for none; links without limit are left out."""
        network, ranks = self.network, self.ranks
        node_s, node_t = source_F // network.ranks_per_node, target_F // network.ranks_per_node
        nics = -(-ranks // network.ranks_per_node) * network.nics_per_node
        leaves_F = node_s != node_t
        through_F = ~leaves_F | network.nic_behind_port
        columns = [np.where(through_F, source_F, -1), np.where(through_F, ranks + target_F, -1)]
        for end_F, node_F, first in ((source_F, node_s, 2 * ranks), (target_F, node_t, 2 * ranks + nics)):
            place_F = end_F % network.ranks_per_node * network.nics_per_node // network.ranks_per_node
            columns.append(np.where(leaves_F, first + node_F * network.nics_per_node + place_F, -1))
        if network.nodes_per_group:
            groups = (len(self.capacity_L) - 2 * (ranks + nics)) // 2
            group_s, group_t = node_s // network.nodes_per_group, node_t // network.nodes_per_group
            first = 2 * (ranks + nics)
            columns.append(np.where(group_s != group_t, first + group_s, -1))
            columns.append(np.where(group_s != group_t, first + groups + group_t, -1))
        way_FP = np.stack(columns, 1)
        way_FP[np.isinf(self.capacity_L[way_FP])] = -1
        return way_FP


def _bundles(way_FP: Ints, bytes_F: Floats) -> tuple[Ints, Ints, Ints]:
    """Of each bundle a flow, of each flow its bundle, of each bundle how many flows."""
    key_F = np.unique(bytes_F, return_inverse=True)[1]
    for way_F in way_FP.T:
        key_F = np.unique(key_F * (way_F.max(initial=0) + 2) + way_F + 1, return_inverse=True)[1]
    _, first_B, bundle_F, count_B = np.unique(key_F, return_index=True, return_inverse=True, return_counts=True)
    return first_B, bundle_F, count_B
