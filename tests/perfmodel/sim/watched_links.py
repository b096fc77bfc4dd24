"""Links that are watched while a step is simulated: at each moment at which rates change, and summed up over all of it."""

from collections.abc import Sequence

import numpy as np

from megalina.perfmodel.sim.network import Load
from megalina.perfmodel.sim.traffic import Moving, Traffic


class WatchedTraffic(Traffic):
    """As `Traffic`; notes what each link has carried, and stops where links are too full, or idle though something could move."""

    def __init__(self, capacity_L: np.ndarray):
        super().__init__(capacity_L)
        self.capacity_L = capacity_L
        self.carried_L = np.zeros(len(capacity_L))
        self.moments = 0
        self._until_s = 0.0
        self._used_L = np.zeros(len(capacity_L))

    def settle(self, now_s: float) -> float:
        self.carried_L += self._used_L * (now_s - self._until_s)
        next_s = super().settle(now_s)
        self._until_s, self._used_L = now_s, np.zeros(len(self.capacity_L))
        if any(m.left_B.any() for m in self.moving):
            load, rate_B, urgency_B = together(self.moving)
            fair_and_thrifty(self.capacity_L, load, rate_B, urgency_B)
            self._used_L = np.bincount(load.link_I, load.weight_I * rate_B[load.bundle_I], len(self.capacity_L))
            self.moments += 1
        return next_s


def fair_and_thrifty(capacity_L: np.ndarray, load: Load, rate_B: np.ndarray, urgency_B: np.ndarray) -> None:
    """No link carries more than it can; and each bundle has a full link on which none that isn't more urgent is faster."""
    used_L = np.bincount(load.link_I, load.weight_I * rate_B[load.bundle_I], len(capacity_L))
    assert (used_L <= capacity_L * (1 + 1e-9)).all()
    full_L = used_L >= capacity_L * (1 - 1e-9)
    for b, rate in enumerate(rate_B):
        rivals = [load.bundle_I[load.link_I == link] for link in load.link_I[load.bundle_I == b] if full_L[link]]
        bound = [max(rate_B[on][urgency_B[on] >= urgency_B[b]]) <= rate * (1 + 1e-9) + 1e-9 for on in rivals]
        assert any(bound)


def together(moving: Sequence[Moving]) -> tuple[Load, np.ndarray, np.ndarray]:
    """All bundles that have something left as one load, their rates, their urgencies."""
    rate_B, left_B = (np.concatenate([getattr(m, name) for m in moving]) for name in ("rate_B", "left_B"))
    urgency_B = np.concatenate([np.full(len(m.whole_B), m.urgency) for m in moving])
    counts = np.cumsum([0] + [len(m.whole_B) for m in moving])
    bundle_I = np.concatenate([m.load.bundle_I + n for m, n in zip(moving, counts, strict=False)])
    link_I, weight_I = (np.concatenate([getattr(m.load, name) for m in moving]) for name in ("link_I", "weight_I"))
    live_B = left_B > 0
    assert not rate_B[~live_B].any()
    live_I = live_B[bundle_I]
    load = Load(left_B[live_B], (np.cumsum(live_B) - 1)[bundle_I[live_I]], link_I[live_I], weight_I[live_I], 0.0)
    return load, rate_B[live_B], urgency_B[live_B]
