"""Oracle predictor: knows each batch's own counts in advance.  What is left to gain then can't be gained by predicting.

Only for a replay of what is known already: the counts are handed in when it is made, and the state is the number of batches
that a layer has served.

Shapes: T tokens of a rank, K choices a token, B batches, L MoE layers, E experts.
"""

import numpy as np

from megalina.placement.predictors.predictor import Counts, Floats, Ids, Seen, as_shares


class OraclePredictor:
    """`counts_BLE`: rows of each expert in each layer of each batch, of all ranks together, in the order in which the batches
    are served.  ValueError when asked for one batch more than that."""

    def __init__(self, counts_BLE: Counts):
        if counts_BLE.ndim != 3:
            raise ValueError(f"the oracle wants counts [batches, layers, experts], not {list(counts_BLE.shape)}")
        self._counts_BLE = np.asarray(counts_BLE, np.float64)

    def start(self, layer: int) -> int:
        return 0

    def features(self, layer: int, seen: Seen) -> Floats:
        return np.zeros(0)

    def expect(self, layer: int, features: Floats, state: int) -> Floats:
        if state >= len(self._counts_BLE):
            raise ValueError(f"the oracle was told the counts of {len(self._counts_BLE)} batches, but this is batch {state + 1}")
        return as_shares(self._counts_BLE[state, layer])

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        return np.zeros(0)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: int) -> int:
        return state + 1
