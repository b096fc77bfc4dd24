"""Distribution predictor: the profile's marginal of each layer, mixed with the running one; nothing of the batch itself.

What is left of an estimate when tokens' paths are not looked at.

Shapes: T tokens of a rank, K choices a token, E experts, L MoE layers.
"""

import numpy as np

from megalina.placement.predictors.ema import averaged
from megalina.placement.predictors.predictor import Counts, Floats, Ids, Seen, as_shares, check_part, choice_counts, layer_shares


class DistributionPredictor:
    """`counts_LE`: rows of each expert in the profile.  `profile_part`: of the mixture; the rest is the average of the batches,
    which begins as the profile.  `decay`: what a batch leaves of the average.

    ValueError for negative counts, or a part or decay outside 0 to 1."""

    def __init__(self, counts_LE: Counts, *, profile_part: float = 0.5, decay: float = 0.7):
        check_part("profile_part", profile_part)
        check_part("decay", decay)
        self._share_LE = layer_shares(counts_LE)
        self.num_experts = self._share_LE.shape[1]
        self.profile_part, self.decay = profile_part, decay

    def start(self, layer: int) -> Floats:
        return self._share_LE[layer]

    def features(self, layer: int, seen: Seen) -> Floats:
        return np.zeros(0)

    def expect(self, layer: int, features: Floats, state: Floats) -> Floats:
        return as_shares(self.profile_part * self._share_LE[layer] + (1 - self.profile_part) * state)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Floats) -> Floats:
        return averaged(state, evidence, self.decay)
