"""How flows share links: max-min fairness by progressive filling, after strict classes.

Letters: L links, B bundles, I places of bundles on links.
"""

import numpy as np

from megalina.perfmodel.sim.collectives import Floats, Ints

FULL = 1e-12  # of a link's capacity: less room than this is rounding


def fair_rates(capacity_L: Floats, bundle_I: Ints, link_I: Ints, weight_I: Floats, urgency_B: Ints) -> Floats:
    """The rate of each bundle.  A rate of one takes `weight_I` of a link.

    All rates of a class rise alike until a link is full; what crosses it stays there, the others go on (Bertsekas and Gallager,
    Data Networks, section 6.5.2).  Smaller urgencies come first, the next class gets what they leave.  Every bundle must be on a
    link."""
    rate_B = np.zeros(len(urgency_B))
    room_L = capacity_L.astype(float)
    for urgency in np.unique(urgency_B):
        rising_B = urgency_B == urgency
        level = 0.0
        while rising_B.any():
            on_I = rising_B[bundle_I]
            pull_L = np.bincount(link_I[on_I], weight_I[on_I], len(room_L))
            crossed_L = pull_L > 0
            level_L = np.full(len(room_L), np.inf)
            level_L[crossed_L] = np.maximum(room_L[crossed_L], 0.0) / pull_L[crossed_L]
            level = max(level, float(level_L.min()))
            full_L = level_L <= level * (1 + FULL)
            stops_B = np.zeros(len(rate_B), bool)
            stops_B[bundle_I[on_I & full_L[link_I]]] = True
            rate_B[stops_B] = level
            rising_B &= ~stops_B
            stops_I = stops_B[bundle_I]
            room_L -= np.bincount(link_I[stops_I], weight_I[stops_I] * level, len(room_L))
        room_L[room_L < FULL * capacity_L] = 0.0
    return rate_B
