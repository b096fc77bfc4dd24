"""Online paths predictor: Lina's path table, put right by what the batches served have shown.

Paths say how tokens of the profile's traffic went on.  Of other traffic they are wrong by about the same in each batch, so each
batch adds one equation: with these counts of the last layers the table was wrong by this much
(`megalina.placement.predictors.batch_memory`, as for the online map).  The table itself stays as it was profiled.

Shapes: K choices a token, E experts, F features of the map: E times the layers looked back at, the latest first.
"""

import numpy as np

from megalina.placement.predictors.batch_memory import Learned, correction, empty_memory, remembered
from megalina.placement.predictors.counts import averaged
from megalina.placement.predictors.linear_map import LEAST, LinearMap, counts_behind
from megalina.placement.predictors.path_table import PathTablePredictor
from megalina.placement.predictors.predictor import Floats, Ids, Seen, as_shares, choice_counts


class OnlinePathsPredictor:
    """`paths`: what is put right; `profile`: of the same trace, says how alike batches' counts are.  `batches`, `equal_tokens`,
    `forgetting`, `decay`: as of `OnlineMapPredictor`."""

    def __init__(
        self,
        paths: PathTablePredictor,
        profile: LinearMap,
        *,
        batches: int = 32,
        equal_tokens: float = 256.0,
        forgetting: float = 0.9,
        decay: float = 0.5,
    ):
        self.paths, self.profile = paths, profile
        self.batches, self.equal_tokens, self.forgetting, self.decay = batches, equal_tokens, forgetting, decay

    def start(self, layer: int) -> Learned:
        num_features, num_experts = self.profile.weights[layer].shape
        return Learned(self.profile.share_LE[layer], empty_memory(num_features, num_experts))

    def features(self, layer: int, seen: Seen) -> Floats:
        """[E + F], rows that the table expects, then counts of the last layers."""
        behind_F = counts_behind(seen, layer, self.profile.layers_back, self.profile.num_experts)
        return np.concatenate([self.paths.features(layer, seen), behind_F])

    def expect(self, layer: int, features: Floats, state: Learned) -> Floats:
        expected_E, behind_F = self._parted(features)
        if not behind_F.any():
            return as_shares(state.average_E)
        input_F = behind_F / self._tokens(layer, behind_F)
        table_E = self.paths.expect(layer, expected_E, None)
        return as_shares(self.profile.top_k * table_E + correction(state.memory, input_F), LEAST)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.profile.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Learned) -> Learned:
        memory, (expected_E, behind_F) = state.memory, self._parted(features)
        if behind_F.any() and evidence.any():
            tokens = self._tokens(layer, behind_F)
            input_F = behind_F / tokens
            memory = remembered(
                memory,
                input_F,
                input_F @ self.profile.inverses[layer] * self.profile.tokens,
                self.profile.top_k * (as_shares(evidence) - self.paths.expect(layer, expected_E, None)),
                weight=tokens / self.equal_tokens,
                forgetting=self.forgetting,
                most=self.batches,
            )
        return Learned(averaged(state.average_E, evidence, self.decay), memory)

    def _parted(self, features: Floats) -> tuple[Floats, Floats]:
        return features[: self.profile.num_experts], features[self.profile.num_experts :]

    def _tokens(self, layer: int, behind_F: Floats) -> float:
        """Of the batch; fewer where some of their choices went to nobody."""
        return float(behind_F.sum()) / (min(layer, self.profile.layers_back) * self.profile.top_k)
