"""Look-ahead predictor: the layer's own router, asked before its time: on the hidden state of the layer before.

What it says is off by what the layers between add to the hidden state, much the same for all batches of a kind.  So a linear map
from what it says to what comes true is learned, if wanted: from a trace that has both, token by token (`fit_confusion`), and from
the batches served.  Without a trace it starts as doing nothing.  For a laptop's model of 8 experts the trace's map alone took
the error of shares from 0.20 to 0.07 on text of the trace's kind, but from 0.30 to 0.20 only on other text; with the last 32
batches it came to 0.07 and 0.06.

Shapes: T tokens of a rank or a trace, K choices a token, E experts, L MoE layers.
"""

import numpy as np

from megalina.placement.predictors.batch_memory import Learned, correction, empty_memory, remembered
from megalina.placement.predictors.counts import averaged
from megalina.placement.predictors.linear_map import LEAST, multi_hot
from megalina.placement.predictors.predictor import Counts, Floats, Ids, Seen, as_shares, check_part, choice_counts, layer_shares

RIDGE = 30.0  # tokens; 1 to 300 do as well on traces of 32,000 tokens of 8 experts


def fit_confusion(ahead_TLK: Ids, chosen_TLK: Ids, num_experts: int, *, ridge: float = RIDGE) -> Floats:
    """[L, E, E], each layer's map from the shares that its router says ahead, a row, to those that come true.

    Ridge regression towards doing nothing, over the trace's tokens: W that minimises |Y - X W|^2 + ridge |W - 1|^2, where X and Y
    are what was said and what was chosen, multi-hot.  Where nothing was said, as of the first layer, it does nothing.  Ids of
    `num_experts` are no expert.  ValueError unless both are [T, L, K], at least one token, and the ridge is above 0."""
    if chosen_TLK.ndim != 3 or not chosen_TLK.size or ahead_TLK.shape != chosen_TLK.shape:
        raise ValueError(
            f"ids said ahead and ids chosen must both be [tokens, layers, choices], at least one of each, not "
            f"{list(ahead_TLK.shape)} and {list(chosen_TLK.shape)}"
        )
    if not ridge > 0:
        raise ValueError(f"ridge {ridge}: take one above 0")
    nothing_EE = ridge * np.eye(num_experts)
    maps = []
    for layer in range(chosen_TLK.shape[1]):
        said_TE, chosen_TE = (multi_hot(ids_TLK[:, layer], num_experts) for ids_TLK in (ahead_TLK, chosen_TLK))
        # float32 is exact for these sums up to 16 million tokens
        xx_EE, xy_EE = ((said_TE.T @ hot_TE).astype(np.float64) for hot_TE in (said_TE, chosen_TE))
        maps.append(np.linalg.solve(xx_EE + nothing_EE, xy_EE + nothing_EE))
    return np.stack(maps)


class LookAheadPredictor:
    """`counts_LE`: rows of each expert in the profile, or ones; for a layer that nothing is known of.

    `maps`: of `fit_confusion`, how the router errs; None believes it.  `batches`: so many are remembered to correct what is said
    with or without maps; 0 learns nothing while serving.  `trust`: rows of a batch after which its correction counts as much as
    what was said, roughly.  `forgetting`: what a batch leaves of the weight of those before.  `decay`: of the running average
    where nothing was said, as before the first layer.

    ValueError for negative counts or batches, maps of another shape, a trust that isn't above 0, or a forgetting or decay outside
    0 to 1."""

    def __init__(
        self,
        counts_LE: Counts,
        *,
        maps: Floats | None = None,
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
        if maps is not None and maps.shape != (*self._share_LE.shape, self.num_experts):
            raise ValueError(
                f"maps are {list(maps.shape)}: for counts {list(self._share_LE.shape)} each layer needs one of E x E"
            )
        self.maps = maps
        self.batches, self.trust, self.forgetting, self.decay = batches, trust, forgetting, decay

    def start(self, layer: int) -> Learned:
        return Learned(self._share_LE[layer], empty_memory(self.num_experts, self.num_experts))

    def features(self, layer: int, seen: Seen) -> Floats:
        """[E], the rows that the router would give each expert; zeros where it wasn't asked.

        ValueError where it wasn't and layers have been: somebody forgot to ask."""
        if seen.ahead_E is not None:
            return np.asarray(seen.ahead_E, np.float64)
        if seen.chosen:
            raise ValueError(f"MoE layer {layer}'s router wasn't asked ahead, which the look-ahead predictor needs")
        return np.zeros(self.num_experts)

    def expect(self, layer: int, features: Floats, state: Learned) -> Floats:
        if not features.any():
            return as_shares(state.average_E)
        said_E = as_shares(features)
        corrects = self.maps is not None or self.batches > 0
        # an even share is 1 here, so that trust means the same for any number of experts
        learned_E = correction(state.memory, self.num_experts * said_E)
        return as_shares(self._mapped(layer, said_E) + learned_E, LEAST if corrects else 0.0)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Learned) -> Learned:
        memory = state.memory
        if self.batches and features.any() and evidence.any():
            said_E = as_shares(features)
            input_E = self.num_experts * said_E
            memory = remembered(
                memory,
                input_E,
                input_E / self.num_experts,
                as_shares(evidence) - self._mapped(layer, said_E),
                weight=float(evidence.sum()) / self.trust,
                forgetting=self.forgetting,
                most=self.batches,
            )
        return Learned(averaged(state.average_E, evidence, self.decay), memory)

    def _mapped(self, layer: int, said_E: Floats) -> Floats:
        """[E], sum about 1, some perhaps negative."""
        return said_E if self.maps is None else said_E @ self.maps[layer]
