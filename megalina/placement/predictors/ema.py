"""EMA predictor: each layer's rows are shared as in the past, by an exponential moving average of the batches' shares.

Shapes: T tokens of a rank, K choices a token, E experts, L MoE layers.
"""

import numpy as np

from megalina.placement.predictors.predictor import Counts, Floats, Ids, Seen, as_shares, check_part, choice_counts, layer_shares


class EmaPredictor:
    """`counts_LE`: rows of each expert in the profile, or ones: where the average begins.  `decay`: what a batch leaves of the
    average before; one without rows leaves all of it.  ValueError for negative counts, or a decay outside 0 to 1."""

    def __init__(self, counts_LE: Counts, *, decay: float = 0.5):
        check_part("decay", decay)
        self._share_LE = layer_shares(counts_LE)
        self.num_experts = self._share_LE.shape[1]
        self.decay = decay

    def start(self, layer: int) -> Floats:
        return self._share_LE[layer]

    def features(self, layer: int, seen: Seen) -> Floats:
        return np.zeros(0)

    def expect(self, layer: int, features: Floats, state: Floats) -> Floats:
        return as_shares(state)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Floats) -> Floats:
        return averaged(state, evidence, self.decay)


def averaged(share_E: Floats, counts_E: Floats, decay: float) -> Floats:
    """[E], the average after a batch; as before where the batch had no rows."""
    return decay * share_E + (1 - decay) * as_shares(counts_E) if counts_E.any() else share_E
