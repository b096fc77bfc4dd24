"""Folding: a network in which all ranks do the same, with one link in place of all that carry the same.

Bundles of flows and links get colours, which are made finer until all links of a colour carry equally much of bundles of each
colour, and all bundles of a colour cross equally many links of each (the coarsest equitable partition).  Then fair shares depend
on colours alone, for rates rise and stop alike.  So one link of each colour tells the rates of all, however many ranks there are.

Letters: L links, B bundles, I places of bundles on links; folded: K colours of bundles, J colours of links.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.perfmodel.sim.collectives import Collective, Floats, Ints, Phase
from megalina.perfmodel.sim.network import Load, Loads, Network

DIGITS = 10  # weights and amounts that agree so far are equal
Use = tuple[str, Collective]  # what is sent along an axis


class FoldedLoads(Loads):
    """As `Loads`, where all groups of an axis always begin a collective together: what one link of each colour has of it.

    `uses`: all that will be sent.  ValueError where the groups of an axis aren't alike in this network; with `slowest` they all
    end with the slowest of them.  `known`: what others have worked out for the same network, groups and `slowest`, to which this
    adds."""

    def __init__(
        self,
        network: Network,
        ranks: int,
        ranks_of: Callable[[str, int], tuple[int, ...]],
        uses: Collection[Use],
        *,
        slowest: bool = False,
        known: dict[tuple[Use, bool], list["_Phase"]] | None = None,
    ):
        groups = {axis: _groups(axis, ranks, ranks_of) for axis in dict.fromkeys(axis for axis, _ in uses)}
        self._fold(network, ranks, groups, uses, slowest=slowest, known=known)

    def _fold(
        self,
        network: Network,
        ranks: int,
        groups: Mapping[str, Ints],
        uses: Collection[Use],
        *,
        slowest: bool,
        known: dict[tuple[Use, bool], list["_Phase"]] | None = None,
    ) -> None:
        """`groups`: the ranks of each group of an axis, which need not be all ranks."""
        super().__init__(network, ranks)
        self._known = {} if known is None else known
        phases, colour_B, colour_L = self._coloured(groups, uses, slowest=slowest, few=True)
        if not self._crossed_alike(phases.values(), colour_L):
            phases, colour_B, colour_L = self._coloured(groups, uses, slowest=slowest, few=False)
        links_J = np.bincount(colour_L)
        at, self._by_use = 0, dict[Use, tuple[Load, ...]]()
        for (axis, what), joined in phases.items():
            loads = []
            for phase in joined:
                colours, colour_of_B = np.unique(colour_B[at : at + len(phase.group_B)], return_inverse=True)
                at += len(phase.group_B)
                in_groups = np.unique(phase.group_B * max(len(colours), 1) + colour_of_B)
                if not slowest and len(in_groups) != len(colours) * phase.groups:
                    raise ValueError(_unlike(axis, what))
                loads.append(_folded(phase.load, colour_of_B, len(colours), colour_L, links_J))
            self._by_use[axis, what] = tuple(loads)
        capacity_J = np.zeros(len(links_J))
        capacity_J[colour_L] = self.capacity_L
        self.capacity_L = capacity_J

    def of(self, axis: str, what: Collective, ranks: tuple[int, ...], bytes_NN: Floats | None = None) -> tuple[Load, ...]:
        """Of all groups of the axis at once."""
        return self._by_use[axis, what]

    def _coloured(
        self, groups: Mapping[str, Ints], uses: Collection[Use], *, slowest: bool, few: bool
    ) -> tuple[dict[Use, list["_Phase"]], Ints, Ints]:
        """The phases of all uses, and the colours of all bundles, one phase after another, and of all links."""
        phases = {
            (axis, what): self._phases_once(axis, what, groups[axis], slowest=slowest, few=few)
            for axis, what in uses
            if groups[axis].shape[1] > 1
        }
        return phases, *_colours([phase for joined in phases.values() for phase in joined], self.capacity_L)

    def _phases_once(self, axis: str, what: Collective, rank_GN: Ints, *, slowest: bool, few: bool) -> list["_Phase"]:
        key = (axis, what), few
        if key not in self._known:
            self._known[key] = self._phases(axis, what, rank_GN, slowest=slowest, few=few)
        return self._known[key]

    def _phases(self, axis: str, what: Collective, rank_GN: Ints, *, slowest: bool, few: bool) -> list["_Phase"]:
        """Groups that lie over nodes in the same way have the same flows between other ranks."""
        node_GN = rank_GN // self.network.ranks_per_node
        core_GN = node_GN // max(1, self.network.nodes_per_group)
        lies: dict[bytes, list[int]] = {}
        for g, row in enumerate(np.concatenate([_dense_rows(node_GN), _dense_rows(core_GN)], axis=1)):
            lies.setdefault(row.tobytes(), []).append(g)
        found: list[list[_Phase]] = []
        for alike in lies.values():
            first_N = rank_GN[alike[0]]
            order_N = np.argsort(first_N)
            phases = self.network.phases(what, tuple(first_N.tolist()), few=few)
            places = [
                [order_N[np.searchsorted(first_N, end_F, sorter=order_N)] for end_F in (p.source_F, p.target_F)] for p in phases
            ]
            after_s = self.network.after_s(what, phases)
            found.append(
                [
                    self._of_groups(what, phase, rank_GN[alike], place, s)
                    for phase, place, s in zip(phases, places, after_s, strict=True)
                ]
            )
        if not slowest and len({tuple(phase.load.latency_s for phase in phases) for phases in found}) > 1:
            raise ValueError(_unlike(axis, what))
        return [_joined(same) for same in zip(*found, strict=True)]

    def _of_groups(self, what: Collective, phase: Phase, rank_GN: Ints, places: Sequence[Ints], latency_s: float) -> "_Phase":
        groups, flows = len(rank_GN), len(phase.bytes_F)
        source_F, target_F = (rank_GN[:, place_F].ravel() for place_F in places)
        count_F = None if phase.count_F is None else np.tile(phase.count_F, groups)
        every = Phase(source_F, target_F, np.tile(phase.bytes_F, groups), phase.hops, phase.fast_hops, count_F)
        load, group_B = self._load(what, every, latency_s, np.repeat(np.arange(groups), flows))
        return _Phase(load, group_B, groups, few=count_F is not None)

    def _crossed_alike(self, phases: Iterable[Sequence["_Phase"]], colour_L: Ints) -> bool:
        """Whether each group whose flows are few by `phases_of` crosses links of one colour for each kind of them.  Where
        collectives share, who meets whom doesn't matter."""
        if self.network.share == "collective":
            return True
        kind_L = self.network.kinds(self.ranks)
        for phase in (phase for joined in phases for phase in joined if phase.few):
            load = phase.load
            place_I = phase.group_B[load.bundle_I] * (kind_L.max() + 1) + kind_L[load.link_I]
            colours = np.unique(place_I * len(colour_L) + colour_L[load.link_I])
            if len(colours) > len(np.unique(place_I)):
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase of groups of an axis."""

    load: Load
    group_B: Ints
    groups: int
    few: bool  # one flow in place of many


def _unlike(axis: str, what: Collective) -> str:
    return f"{what.value} along axis {axis}: its groups share links with different things: simulate every rank, or say slowest"


def _groups(axis: str, ranks: int, ranks_of: Callable[[str, int], tuple[int, ...]]) -> Ints:
    """The ranks of each group.  ValueError where they aren't equally many."""
    seen, groups = np.zeros(ranks, bool), []
    for rank in range(ranks):
        if not seen[rank]:
            groups.append(ranks_of(axis, rank))
            seen[list(groups[-1])] = True
    if len(sizes := {len(group) for group in groups}) > 1:
        raise ValueError(f"axis {axis} has groups of {sorted(sizes)} ranks, which aren't alike: simulate every rank")
    return np.array(groups)


def _joined(phases: Sequence[_Phase]) -> _Phase:
    """Of all groups of an axis."""
    loads = [phase.load for phase in phases]
    starts = np.cumsum([0, *(len(load.amount_B) for load in loads)])
    groups = np.cumsum([0, *(phase.groups for phase in phases)])
    load = Load(
        np.concatenate([load.amount_B for load in loads]),
        np.concatenate([load.bundle_I + start for load, start in zip(loads, starts, strict=False)]),
        np.concatenate([load.link_I for load in loads]),
        np.concatenate([load.weight_I for load in loads]),
        max(load.latency_s for load in loads),
    )
    group_B = np.concatenate([phase.group_B + before for phase, before in zip(phases, groups, strict=False)])
    return _Phase(load, group_B, int(groups[-1]), any(phase.few for phase in phases))


def _folded(load: Load, colour_B: Ints, colours: int, colour_L: Ints, links_J: Ints) -> Load:
    """All bundles of a colour as one: on one link of each colour there is so much of them."""
    amount_K = np.zeros(colours)
    amount_K[colour_B] = load.amount_B
    place_I = colour_B[load.bundle_I] * len(links_J) + colour_L[load.link_I]
    places, place_of_I = np.unique(place_I, return_inverse=True)
    bundle_I, link_I = places // len(links_J), places % len(links_J)
    weight_I = np.bincount(place_of_I, load.weight_I, len(places)) / links_J[link_I]
    return Load(amount_K, bundle_I, link_I, weight_I, load.latency_s)


def _colours(phases: Sequence[_Phase], capacity_L: Floats) -> tuple[Ints, Ints]:
    """Of all bundles, one phase after another, and of all links."""
    loads = [phase.load for phase in phases]
    counts = [len(load.amount_B) for load in loads]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    bundle_I = np.concatenate([load.bundle_I + start for load, start in zip(loads, starts, strict=False)] or [starts[:0]])
    link_I = np.concatenate([load.link_I for load in loads] or [starts[:0]])
    weight_I = _ids(np.concatenate([load.weight_I for load in loads] or [capacity_L[:0]]))
    amount_B = _ids(np.concatenate([load.amount_B for load in loads] or [capacity_L[:0]]))
    phase_B = np.repeat(np.arange(len(loads)), counts)
    colour_B = _dense(phase_B * (amount_B.max(initial=0) + 1) + amount_B)
    colour_L = _ids(capacity_L)
    random, count = np.random.default_rng(0), -1
    while count != (count := colour_B.max(initial=0) + colour_L.max()):
        colour_L = _finer(colour_L, link_I, colour_B[bundle_I], weight_I, random)
        colour_B = _finer(colour_B, bundle_I, colour_L[link_I], weight_I, random)
    return colour_B, colour_L


def _finer(colour_X: Ints, at_I: Ints, seen_I: Ints, weight_I: Ints, random: np.random.Generator) -> Ints:
    """What had one colour and sees different things gets different colours.  What is seen counts by random numbers of 63 bits,
    whose sums agree for equal things alone (but for a chance of 1e-12)."""
    seen_I = seen_I * (weight_I.max(initial=0) + 1) + weight_I
    number = random.integers(0, 2**63, int(seen_I.max(initial=0)) + 1, dtype=np.uint64)
    sum_X = random.integers(0, 2**63, int(colour_X.max(initial=0)) + 1, dtype=np.uint64)[colour_X]
    np.add.at(sum_X, at_I, number[seen_I])
    return _dense(sum_X)


def _ids(values: Floats) -> Ints:
    """The same number for what agrees to `DIGITS`."""
    exponent = np.floor(np.log10(np.where((values > 0) & np.isfinite(values), values, 1.0)))
    return _dense(np.round(values / 10**exponent, DIGITS) + 100 * exponent)


def _dense(values: NDArray[Any]) -> Ints:
    return np.unique(values, return_inverse=True)[1]


def _dense_rows(values: Ints) -> Ints:
    """`_dense` of each row, of thousands at once."""
    order = np.argsort(values, axis=1, kind="stable")
    rising = np.take_along_axis(values, order, axis=1)
    number = np.cumsum(np.diff(rising, axis=1, prepend=rising[:, :1]) != 0, axis=1)
    out = np.empty_like(number)
    np.put_along_axis(out, order, number, axis=1)
    return out
