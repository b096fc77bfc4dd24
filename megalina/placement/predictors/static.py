"""Static predictor: each layer's rows are shared as they were in the profile, or evenly, whatever the batch.

Shapes: T tokens of a rank, K choices a token, E experts, L MoE layers.
"""

from typing import Any

import numpy as np

from megalina.placement.predictors.predictor import Counts, Floats, Ids, Seen, layer_shares


class StaticPredictor:
    """`counts_LE`: rows of each expert in the profile, or shares; ones for an even share.  ValueError for negative ones."""

    def __init__(self, counts_LE: Counts):
        self._share_LE = layer_shares(counts_LE)

    def start(self, layer: int) -> None:
        return None

    def features(self, layer: int, seen: Seen) -> Floats:
        return np.zeros(0)

    def expect(self, layer: int, features: Floats, state: Any) -> Floats:
        return self._share_LE[layer].copy()

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        return np.zeros(0)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Any) -> Any:
        return state
