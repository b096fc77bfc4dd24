"""The network: links over a hierarchy of devices, nodes and groups of nodes, and what collectives put on them.

Every device has a port into its fast domain (NVLink, PCIe), every node network cards, and groups of nodes may hang on a switch
core that is too small for all of them at once.  All links carry both ways at once.

Letters: L links, F flows, B bundles, I places of bundles on links.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megalina.perfmodel.sim.collectives import ALGORITHMS, ALL_TO_ALLS, Collective, Floats, Ints, Phase, phases_of
from megalina.step.program import Op

SHARES = ("flow", "collective")
TO_EACH = (
    *(Collective.ALL_TO_ALL, Collective.SEND, Collective.ALL_TO_ALL_BY_NODE),
    *(Collective.REDUCE_SCATTER_BY_NODE, Collective.ALL_GATHER_BY_NODE),
)


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
    all_to_all_s: float | None = None  # of an all-to-all; None: as the others
    hop_s: float = 0.0  # of each step between nodes
    fast_hop_s: float = 0.0  # of each step inside a node
    algorithm: str = "ring"  # of all but all-to-alls, see `phases_of`
    reduce_scatter: str | None = None  # its own algorithm; None: as the others
    all_to_all: str = "direct"
    rings: int = 1
    share: str = "flow"
    inside: float = 1.0  # of an all-to-all by node: bytes inside of nodes over those between them
    at_once: int = 0  # collectives of an axis that are under way together; what comes next waits for one to end; 0: no limit
    weight: float = 1.0  # in sharing a link: what a flow of a ring or tree gets where one from everybody to everybody gets 1
    first: tuple[tuple[Op, ...], ...] = ()  # classes that come first, strictly, in this order; all else comes last

    def __post_init__(self) -> None:
        for name in ("nic_bytes_per_s", "fast_bytes_per_s", "weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: give bytes a second above 0")
        for name in ("latency_s", "all_to_all_s", "hop_s", "fast_hop_s"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name):g}: give seconds, 0 or more")
        if not (1 <= self.nics_per_node <= self.ranks_per_node):
            raise ValueError(f"nics_per_node ({self.nics_per_node}) must be 1 to ranks_per_node ({self.ranks_per_node})")
        if not (1 <= self.rings <= self.ranks_per_node):
            raise ValueError(f"rings ({self.rings}) must be 1 to ranks_per_node ({self.ranks_per_node})")
        if self.at_once < 0:
            raise ValueError(f"at_once is {self.at_once}: give a number of collectives, or 0 for no limit")
        if self.nodes_per_group < 0 or not 1 <= self.oversubscription < math.inf:
            numbers = f"nodes_per_group is {self.nodes_per_group}, oversubscription {self.oversubscription:g}"
            raise ValueError(f"{numbers}: give 0 or more nodes, and 1 or more")
        scatters = (*ALGORITHMS, None)
        choices = (("algorithm", ALGORITHMS), ("all_to_all", ALL_TO_ALLS), ("reduce_scatter", scatters), ("share", SHARES))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(map(str, known))}")

    def urgency(self, op: Op) -> int:
        return next((i for i, ops in enumerate(self.first) if op in ops), len(self.first))

    def capacities(self, ranks: int) -> Floats:
        """Of all links: ports out, ports in, cards out, cards in, the core's ports up, down."""
        core_bytes_per_s = self.nodes_per_group * self.nics_per_node * self.nic_bytes_per_s / self.oversubscription
        rates = (self.fast_bytes_per_s, self.nic_bytes_per_s, core_bytes_per_s)
        return np.repeat([float(rate) for rate in rates for _ in range(2)], self._counts(ranks))

    def kinds(self, ranks: int) -> Ints:
        """Of all links a number that is the same for those of the same sort and direction."""
        return np.repeat(np.arange(6), self._counts(ranks))

    def _counts(self, ranks: int) -> list[int]:
        nodes = -(-ranks // self.ranks_per_node)
        groups = -(-nodes // self.nodes_per_group) if self.nodes_per_group else 0
        return [count for count in (ranks, nodes * self.nics_per_node, groups) for _ in range(2)]

    def phases(
        self, what: Collective, ranks: Sequence[int], bytes_NN: Floats | None = None, *, few: bool = False
    ) -> tuple[Phase, ...]:
        """`few`: one flow in place of many that are alike, as in `phases_of`."""
        return phases_of(
            what,
            ranks,
            ranks_per_node=self.ranks_per_node,
            algorithm=self.algorithm_of(what),
            rings=self.rings,
            bytes_NN=bytes_NN,
            few=few,
            nodes_per_group=self.nodes_per_group,
            inside=self.inside,
        )

    def algorithm_of(self, what: Collective) -> str:
        if what is not what.flat:
            return "hierarchical"
        if what is Collective.REDUCE_SCATTER and self.reduce_scatter is not None:
            return self.reduce_scatter
        return self.all_to_all if what is Collective.ALL_TO_ALL else self.algorithm

    def weight_of(self, what: Collective) -> float:
        """Of its flows, in sharing a link."""
        alone = what in TO_EACH
        return 1.0 if alone or self.algorithm_of(what) == "direct" else self.weight

    def after_s(self, what: Collective, phases: Sequence[Phase]) -> list[float]:
        """How long after the last byte of each phase it is over."""
        own_s = self.latency_s if what.flat is not Collective.ALL_TO_ALL or self.all_to_all_s is None else self.all_to_all_s
        after = [phase.hops * self.hop_s + phase.fast_hops * self.fast_hop_s for phase in phases]
        return [*after[:-1], after[-1] + own_s]


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
        after_s = self.network.after_s(what, phases)
        return tuple(self._load(what, phase, s)[0] for phase, s in zip(phases, after_s, strict=True))

    def _load(self, what: Collective, phase: Phase, latency_s: float, group_F: Ints | None = None) -> tuple[Load, Ints]:
        """And the group of each bundle.  `group_F`: of each flow; None: all are of one group."""
        count_F = np.ones(len(phase.bytes_F), int) if phase.count_F is None else phase.count_F
        group_F = np.zeros(len(count_F), int) if group_F is None else group_F
        way_FP = self._ways(phase.source_F, phase.target_F)
        limited_F = (way_FP >= 0).any(1)  # the others take no time
        way_FP, bytes_F, count_F, group_F = way_FP[limited_F], phase.bytes_F[limited_F], count_F[limited_F], group_F[limited_F]
        weight = self.network.weight_of(what)
        if self.network.share == "collective":
            load, group_B = self._in_step(way_FP, bytes_F * count_F, group_F, latency_s)
            return _weighted(load, weight), group_B
        first_B, bundle_F = _bundles(way_FP, bytes_F, group_F)
        count_B = np.bincount(bundle_F, count_F, len(first_B))
        way_BP = way_FP[first_B]
        bundle_I, place_I = np.nonzero(way_BP >= 0)
        load = Load(bytes_F[first_B], bundle_I, way_BP[bundle_I, place_I], count_B[bundle_I].astype(float), latency_s)
        return _weighted(load, weight), group_F[first_B]

    def _in_step(self, way_FP: Ints, bytes_F: Floats, group_F: Ints, latency_s: float) -> tuple[Load, Ints]:
        """All flows of a group are a bundle, of which a byte is a second that the group's phase takes alone."""
        links = len(self.capacity_L)
        crossed_FP = way_FP >= 0
        key_I = (group_F[:, None] * links + way_FP)[crossed_FP]
        key_J, place_I = np.unique(key_I, return_inverse=True)
        bytes_J = np.bincount(place_I, np.broadcast_to(bytes_F[:, None], way_FP.shape)[crossed_FP], len(key_J))
        group_B, bundle_J = np.unique(key_J // links, return_inverse=True)
        alone_B = np.zeros(len(group_B))
        np.maximum.at(alone_B, bundle_J, bytes_J / self.capacity_L[key_J % links])
        return Load(alone_B, bundle_J, key_J % links, bytes_J / alone_B[bundle_J], latency_s), group_B

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


def _weighted(load: Load, weight: float) -> Load:
    """Rates rise alike, so what rises in units of `weight` gets so much more."""
    return load if weight == 1.0 else replace(load, amount_B=load.amount_B / weight, weight_I=load.weight_I * weight)


def _bundles(way_FP: Ints, bytes_F: Floats, group_F: Ints) -> tuple[Ints, Ints]:
    """Of each bundle a flow, of each flow its bundle."""
    key_F = np.unique(bytes_F, return_inverse=True)[1]
    for way_F in (group_F, *way_FP.T):
        key_F = np.unique(key_F * (way_F.max(initial=0) + 2) + way_F + 1, return_inverse=True)[1]
    return np.unique(key_F, return_index=True, return_inverse=True)[1:]
