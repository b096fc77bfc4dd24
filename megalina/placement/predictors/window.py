"""Window predictor: each layer's rows are shared as in the last batches, all their rows taken together.

Good while traffic is steady; where tasks take turns it expects the one that has just been.

Shapes: T tokens of a rank, K choices a token, E experts, L MoE layers.
"""

import numpy as np

from megalina.placement.predictors.predictor import Counts, Floats, Ids, Seen, as_shares, choice_counts, layer_shares

Window = tuple[Floats, ...]  # counts [E] of the last batches, the latest last


class WindowPredictor:
    """`counts_LE`: rows of each expert in the profile, or ones; they count until the first batch.  `batches`: so many are
    remembered; one without rows is passed over.  ValueError for negative counts, or no batch."""

    def __init__(self, counts_LE: Counts, *, batches: int = 1):
        if batches < 1:
            raise ValueError(f"a window of {batches} batches: take at least 1")
        self._share_LE = layer_shares(counts_LE)
        self.num_experts = self._share_LE.shape[1]
        self.batches = batches

    def start(self, layer: int) -> Window:
        return ()

    def features(self, layer: int, seen: Seen) -> Floats:
        return np.zeros(0)

    def expect(self, layer: int, features: Floats, state: Window) -> Floats:
        return as_shares(np.sum(state, axis=0)) if state else self._share_LE[layer].copy()

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Window) -> Window:
        return (*state, evidence)[-self.batches :] if evidence.any() else state
