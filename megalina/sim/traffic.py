"""Traffic: what is on the links at a moment of virtual time, how fast each of it moves, and what ends next.

Letters: L links, B bundles of a load, I places of bundles on links.
"""

import math
from dataclasses import dataclass

import numpy as np

from megalina.sim.collectives import Floats
from megalina.sim.network import Load
from megalina.sim.sharing import fair_rates

ROUNDING = 1e-12  # of what a bundle had to send: less is nothing
INSTANT = 1e-14  # of the time: what ends so close together ends together


@dataclass(slots=True, eq=False)
class Moving:
    """A load that is on its way."""

    load: Load
    urgency: int
    whole_B: Floats  # as `Load.amount_B`, for its number of bytes
    left_B: Floats
    rate_B: Floats
    waits: bool = True  # something of it is left


class Traffic:
    """All that moves shares the links; whatever joins or ends changes the rates of all."""

    def __init__(self, capacity_L: Floats):
        self._capacity_L = capacity_L
        self._moving: list[Moving] = []
        self._now_s = 0.0
        self._rates: dict[tuple[tuple[Load, int, bytes], ...], list[Floats]] = {}  # layers are alike: the same comes again

    @property
    def moving(self) -> tuple[Moving, ...]:
        return tuple(self._moving)

    def add(self, load: Load, num_bytes: float, urgency: int, now_s: float) -> Moving:
        """It moves once `settle` has been called."""
        self._advance(now_s)
        whole_B = load.amount_B * num_bytes
        moving = Moving(load, urgency, whole_B, whole_B.copy(), np.zeros(len(whole_B)))
        self._moving.append(moving)
        return moving

    def ended(self, now_s: float) -> list[Moving]:
        """What has nothing left; it is on no link any more."""
        self._advance(now_s)
        over = [m for m in self._moving if not m.left_B.any()]
        if over:
            self._moving = [m for m in self._moving if m.left_B.any()]
        return over

    def settle(self, now_s: float) -> float:
        """Share the links anew; when something ends next, which may be now.  inf with nothing on the way."""
        self._advance(now_s)
        live = [(m.load, m.urgency, (m.left_B > 0).tobytes()) for m in self._moving]
        key = tuple(live)
        if key not in self._rates:
            self._rates[key] = self._shared()
        next_s = math.inf
        for m, rate_B in zip(self._moving, self._rates[key], strict=True):
            m.rate_B = rate_B
            moves_B = rate_B > 0
            if moves_B.any():
                next_s = min(next_s, now_s + float((m.left_B[moves_B] / rate_B[moves_B]).min()))
            if not m.left_B.any():
                next_s = now_s
        return next_s

    def _advance(self, now_s: float) -> None:
        took_s, self._now_s = now_s - self._now_s, now_s
        if not took_s:
            return
        for m in self._moving:
            m.left_B -= m.rate_B * took_s
            m.left_B[m.left_B <= ROUNDING * m.whole_B + INSTANT * now_s * m.rate_B] = 0.0

    def _shared(self) -> list[Floats]:
        """The rates of each that moves; what has ended within a load has none."""
        bundles, links, weights, urgencies = [], [], [], []
        count = 0
        for m in self._moving:
            live_B = m.left_B > 0
            number_B = count + np.cumsum(live_B) - 1
            live_I = live_B[m.load.bundle_I]
            bundles.append(number_B[m.load.bundle_I[live_I]])
            links.append(m.load.link_I[live_I])
            weights.append(m.load.weight_I[live_I])
            urgencies.append(np.full(int(live_B.sum()), m.urgency))
            count += int(live_B.sum())
        if not count:
            return [np.zeros(len(m.left_B)) for m in self._moving]
        used_L, link_I = np.unique(np.concatenate(links), return_inverse=True)
        rates = fair_rates(
            self._capacity_L[used_L], np.concatenate(bundles), link_I, np.concatenate(weights), np.concatenate(urgencies)
        )
        out, at = [], 0
        for m in self._moving:
            live_B = m.left_B > 0
            rate_B = np.zeros(len(live_B))
            rate_B[live_B] = rates[at : at + int(live_B.sum())]
            at += int(live_B.sum())
            out.append(rate_B)
        return out
