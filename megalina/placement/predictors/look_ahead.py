"""Look-ahead predictor: the layer's own router, asked before its time: on the hidden state of the layer before.

What it says is off by what the layers between add to the hidden state, much the same for all batches of a kind.  So a linear map
from what it says to what comes true is learned from the batches served, if wanted; it starts as doing nothing.

Shapes: T tokens of a rank, K choices a token, E experts, L MoE layers.
"""

from dataclasses import dataclass

import numpy as np

from megalina.placement.predictors.batch_memory import BatchMemory, correction, empty_memory, remembered
from megalina.placement.predictors.ema import averaged
from megalina.placement.predictors.linear_map import LEAST
from megalina.placement.predictors.predictor import Floats, Ids, Seen
from megalina.placement.predictors.shares import Counts, as_shares, check_part, choice_counts, layer_shares


@dataclass(frozen=True, slots=True, eq=False)
class Heeded:
    """What is learned of a layer while serving."""

    average_E: Floats  # of the batches' shares, for where nothing was said
    memory: BatchMemory


class LookAheadPredictor:
    """`counts_LE`: rows of each expert in the profile, or ones; for a layer that nothing is known of.

    `batches`: so many are remembered to correct what the router says; 0 believes it.  `trust`: rows of a batch after which its
    correction counts as much as what the router said, roughly.  `forgetting`: what a batch leaves of the weight of those before.
    `decay`: of the running average where nothing was said, as before the first layer.

    ValueError for negative counts or batches, a trust that isn't above 0, or a forgetting or decay outside 0 to 1."""

    def __init__(
        self,
        counts_LE: Counts,
        *,
        batches: int = 0,
        trust: float = 100.0,
        forgetting: float = 0.9,
        decay: float = 0.5,
    ):
        check_part("forgetting", forgetting)
        check_part("decay", decay)
        if batches < 0 or not trust > 0:
            raise ValueError(f"{batches} batches, trust {trust}: take at least 0 batches and a trust above 0")
        self._share_LE = layer_shares(counts_LE)
        self.num_experts = self._share_LE.shape[1]
        self.batches, self.trust, self.forgetting, self.decay = batches, trust, forgetting, decay

    def start(self, layer: int) -> Heeded:
        return Heeded(self._share_LE[layer], empty_memory(self.num_experts, self.num_experts))

    def features(self, layer: int, seen: Seen) -> Floats:
        """[E], the rows that the router would give each expert; zeros where it wasn't asked.

        ValueError where it wasn't and layers have been: somebody forgot to ask."""
        if seen.ahead_E is not None:
            return np.asarray(seen.ahead_E, np.float64)
        if seen.chosen:
            raise ValueError(f"MoE layer {layer}'s router wasn't asked ahead, which the look-ahead predictor needs")
        return np.zeros(self.num_experts)

    def expect(self, layer: int, features: Floats, state: Heeded) -> Floats:
        if not features.any():
            return as_shares(state.average_E)
        said_E = as_shares(features)
        # an even share is 1 here, so that trust means the same for any number of experts
        return as_shares(said_E + correction(state.memory, self.num_experts * said_E), LEAST if self.batches else 0.0)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Heeded) -> Heeded:
        memory = state.memory
        if self.batches and features.any() and evidence.any():
            said_E = as_shares(features)
            input_E = self.num_experts * said_E
            memory = remembered(
                memory,
                input_E,
                input_E / self.num_experts,
                as_shares(evidence) - said_E,
                weight=float(evidence.sum()) / self.trust,
                forgetting=self.forgetting,
                most=self.batches,
            )
        return Heeded(averaged(state.average_E, evidence, self.decay), memory)
