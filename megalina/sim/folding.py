"""Folding: a network in which all ranks do the same, with one link in place of all that carry the same.

Bundles of flows and links get colours, which are made finer until all links of a colour carry equally much of bundles of each
colour, and all bundles of a colour cross equally many links of each (the coarsest equitable partition).  Then fair shares depend
on colours alone, for rates rise and stop alike.  So one link of each colour tells the rates of all, however many ranks there are.

Letters: L links, B bundles, I places of bundles on links; folded: K colours of bundles, J colours of links.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.sim.collectives import Collective, Floats, Ints
from megalina.sim.network import Load, Loads, Network

DIGITS = 10  # weights and amounts that agree so far are equal
Use = tuple[str, Collective]  # what is sent along an axis


class FoldedLoads(Loads):
    """As `Loads`, where all groups of an axis always begin a collective together: what one link of each colour has of it.

    `uses`: all that will be sent.  ValueError where the groups of an axis aren't alike in this network; with `slowest` they all
    end with the slowest of them."""

    def __init__(
        self,
        network: Network,
        ranks: int,
        ranks_of: Callable[[str, int], tuple[int, ...]],
        uses: Collection[Use],
        *,
        slowest: bool = False,
    ):
        super().__init__(network, ranks)
        phases: dict[Use, list[_Phase]] = {}
        for axis, what in uses:
            groups = list(dict.fromkeys(ranks_of(axis, rank) for rank in range(ranks)))
            if len(sizes := {len(group) for group in groups}) > 1:
                raise ValueError(f"axis {axis} has groups of {sorted(sizes)} ranks, which aren't alike: simulate every rank")
            if len(groups[0]) > 1:
                found = [super(FoldedLoads, self).of(axis, what, group) for group in groups]
                if not slowest and len({tuple(load.latency_s for load in loads) for loads in found}) > 1:
                    raise ValueError(_unlike(axis, what))
                phases[axis, what] = [_joined(alike) for alike in zip(*found, strict=True)]
        colour_B, colour_L = _colours([phase for joined in phases.values() for phase in joined], self.capacity_L)
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


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase of all groups of an axis."""

    load: Load
    group_B: Ints
    groups: int


def _unlike(axis: str, what: Collective) -> str:
    return f"{what.value} along axis {axis}: its groups share links with different things: simulate every rank, or say slowest"


def _joined(loads: Sequence[Load]) -> _Phase:
    counts = [len(load.amount_B) for load in loads]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    load = Load(
        np.concatenate([load.amount_B for load in loads]),
        np.concatenate([load.bundle_I + start for load, start in zip(loads, starts, strict=True)]),
        np.concatenate([load.link_I for load in loads]),
        np.concatenate([load.weight_I for load in loads]),
        max(load.latency_s for load in loads),
    )
    return _Phase(load, np.repeat(np.arange(len(loads)), counts), len(loads))


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
