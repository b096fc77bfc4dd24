"""Linear map predictor: the choices of the last layers, multi-hot, times a matrix are the next layer's, multi-hot.

The matrix is a ridge regression over a trace's tokens.  The mean over tokens of a linear map is the map of the mean, so a batch
needs only its experts' counts: one product of a vector and a matrix, nothing for each token, and nothing that grows as E^l.

It has no constant term and needs none: a token's choices sum to K in each layer.  The first layers have fewer layers behind
them, so fewer features; the first has none, and expects the running average of its batches' shares.

Shapes: T tokens, L MoE layers, K choices a token, E experts, F features: E times the layers looked back at, the latest first.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalina.placement.predictors.counts import averaged
from megalina.placement.predictors.predictor import Floats, Ids, Seen, as_shares, check_part, choice_counts, layer_shares

LEAST = 0.01  # times an even share: below that no expert is expected to get
RIDGE = 30.0  # tokens; 3 to 100 do as well on traces of 8,000 tokens


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """A matrix for each MoE layer, and how sure it is."""

    num_experts: int
    top_k: int
    layers_back: int
    tokens: int  # of the trace
    share_LE: Floats  # of the trace
    weights: tuple[Floats, ...]  # [F, E] of each layer; [0, E] of the first
    inverses: tuple[Floats, ...]  # [F, F], of (X'X + ridge): the covariance of the weights, up to the noise


def fit_linear_map(expert_ids_TLK: Ids, num_experts: int, *, layers_back: int = 3, ridge: float = RIDGE) -> LinearMap:
    """Ridge regression, layer by layer: weights W that minimise |Y - X W|^2 + ridge |W|^2 over the trace's tokens.

    Ids of `num_experts` are no expert.  ValueError where there is no token, no layer to look back at, or no ridge."""
    if expert_ids_TLK.ndim != 3 or not expert_ids_TLK.size:
        raise ValueError(f"expert ids must be [tokens, layers, choices], at least one of each, not {list(expert_ids_TLK.shape)}")
    if layers_back < 1 or not ridge > 0:
        raise ValueError(f"a map of {layers_back} layers back with ridge {ridge}: take at least 1 layer and a ridge above 0")
    top_k = expert_ids_TLK.shape[2]
    # float32 is exact for these sums up to 16 million tokens, and twice as fast
    hot = [multi_hot(chosen_TK, num_experts) for chosen_TK in np.moveaxis(expert_ids_TLK, 1, 0)]
    weights, inverses = [], []
    for layer, hot_TE in enumerate(hot):
        inputs_TF = np.concatenate(
            [np.zeros((len(hot_TE), 0), np.float32), *reversed(hot[max(0, layer - layers_back) : layer])], 1
        )
        xx_FF = (inputs_TF.T @ inputs_TF).astype(np.float64)
        xy_FE = (inputs_TF.T @ hot_TE).astype(np.float64)
        inverse_FF = np.linalg.inv(xx_FF + ridge * np.eye(len(xx_FF)))
        inverses.append((inverse_FF + inverse_FF.T) / 2)
        weights.append(inverse_FF @ xy_FE)
    counts_LE = np.stack([hot_TE.sum(axis=0, dtype=np.float64) for hot_TE in hot])
    tokens = len(expert_ids_TLK)
    return LinearMap(num_experts, top_k, layers_back, tokens, layer_shares(counts_LE), tuple(weights), tuple(inverses))


def counts_behind(seen: Seen, layer: int, layers_back: int, num_experts: int) -> Floats:
    """[F], how often each expert of the last layers was chosen, the latest layer first."""
    last = min(layer, layers_back)
    counts = [choice_counts(seen.chosen[layer - 1 - back], num_experts) for back in range(last)]
    return np.concatenate([np.zeros(0), *counts])


@dataclass(frozen=True, slots=True, eq=False)
class Corrected:
    """What is learned of a layer while serving."""

    average_E: Floats  # of the batches' shares
    error_E: Floats  # of the map's shares, running: what was less what was said


class LinearMapPredictor:
    """`correction`: what a batch leaves of the running error, which is added to what the map says; without it the map stays as
    it was fitted.  It helps where traffic differs from the trace, as long as it is steady.  `decay`: of the first layer's
    running average.  ValueError for either outside 0 to 1."""

    def __init__(self, fitted: LinearMap, *, correction: float | None = None, decay: float = 0.5):
        check_part("decay", decay)
        check_part("correction", correction or 0.0)
        self.fitted, self.correction, self.decay = fitted, correction, decay

    def start(self, layer: int) -> Corrected:
        return Corrected(self.fitted.share_LE[layer], np.zeros(self.fitted.num_experts))

    def features(self, layer: int, seen: Seen) -> Floats:
        """[F], counts of the last layers."""
        return counts_behind(seen, layer, self.fitted.layers_back, self.fitted.num_experts)

    def expect(self, layer: int, features: Floats, state: Corrected) -> Floats:
        if not features.any():
            return as_shares(state.average_E)
        return as_shares(self._mapped(layer, features) + state.error_E, LEAST)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.fitted.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Corrected) -> Corrected:
        error_E = state.error_E
        if self.correction is not None and features.any() and evidence.any():
            error_now_E = as_shares(evidence) - self._mapped(layer, features)
            error_E = self.correction * error_E + (1 - self.correction) * error_now_E
        return Corrected(averaged(state.average_E, evidence, self.decay), error_E)

    def _mapped(self, layer: int, features: Floats) -> Floats:
        """[E], sum about 1, some perhaps negative: the map's rows for each row of a layer looked back at."""
        rows = float(features.sum()) / min(layer, self.fitted.layers_back)
        return (features / rows) @ self.fitted.weights[layer]


def multi_hot(chosen_TK: Ids, num_experts: int) -> NDArray[np.float32]:
    """[T, E], 1 where a token chose the expert; nobody is one more expert, who is then left out."""
    hot = np.zeros((len(chosen_TK), num_experts + 1), np.float32)
    np.put_along_axis(hot, chosen_TK.astype(np.int64), 1.0, axis=1)
    return hot[:, :num_experts]
