"""Online map predictor: a linear map from the last layers' counts that goes on learning from each batch served.

It starts as the linear map of the profile, and each batch adds one equation: these counts of the last layers went with those of
this layer (`megalina.placement.predictors.batch_memory`).  So one batch of new traffic is enough to follow it, and what was
learned of one task is not unlearned by the next.  Only counts travel: F to expect and E to learn, for any number of tokens.

Each batch could add an equation for each token instead.  That is F (F + 1) / 2 + F E numbers of evidence instead of E, and
predicted no better on real traces: tokens say how choices vary within a task, which the profile knows, but what is new in new
traffic shows in the means.

Shapes: T tokens of a rank, K choices a token, E experts, F features: E times the layers looked back at, the latest first.
"""

from megalina.placement.predictors.batch_memory import Learned, correction, empty_memory, remembered
from megalina.placement.predictors.counts import averaged
from megalina.placement.predictors.linear_map import LEAST, LinearMap, counts_behind
from megalina.placement.predictors.predictor import Floats, Ids, Seen, as_shares, check_part, choice_counts


class OnlineMapPredictor:
    """`profile`: of `fit_linear_map`.

    `batches`: so many are remembered.  `equal_tokens`: a batch of so many tokens counts as much as the whole profile, however
    long the trace was: traffic that differs does so in more than the noise of a trace's tokens.  `forgetting`: what a batch
    leaves of the weight of those before.  `decay`: of the first layer's running average.

    None of them matters much: on real traces of two tasks, in turns and in batches of 1,024 tokens, 2 batches or more, 32 to
    4,096 equal tokens and forgetting from 0.5 to 1 came within 0.03 of each other in the largest load over the mean.  But the
    memory must reach back to a task's last turn.

    ValueError for no batch, equal tokens that aren't above 0, or a forgetting or decay outside 0 to 1."""

    def __init__(
        self,
        profile: LinearMap,
        *,
        batches: int = 32,
        equal_tokens: float = 256.0,
        forgetting: float = 0.9,
        decay: float = 0.5,
    ):
        check_part("forgetting", forgetting)
        check_part("decay", decay)
        if batches < 1 or not equal_tokens > 0:
            raise ValueError(f"{batches} batches, equal_tokens {equal_tokens}: take at least 1 batch and tokens above 0")
        self.profile, self.batches, self.decay = profile, batches, decay
        self.equal_tokens, self.forgetting = equal_tokens, forgetting

    def start(self, layer: int) -> Learned:
        num_features, num_experts = self.profile.weights[layer].shape
        return Learned(self.profile.share_LE[layer], empty_memory(num_features, num_experts))

    def features(self, layer: int, seen: Seen) -> Floats:
        """[F], counts of the last layers."""
        return counts_behind(seen, layer, self.profile.layers_back, self.profile.num_experts)

    def expect(self, layer: int, features: Floats, state: Learned) -> Floats:
        if not features.any():
            return as_shares(state.average_E)
        input_F = features / self._tokens(layer, features)
        return as_shares(input_F @ self.profile.weights[layer] + correction(state.memory, input_F), LEAST)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.profile.num_experts)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Learned) -> Learned:
        memory = state.memory
        if features.any() and evidence.any():
            tokens = self._tokens(layer, features)
            input_F = features / tokens
            memory = remembered(
                memory,
                input_F,
                input_F @ self.profile.inverses[layer] * self.profile.tokens,
                self.profile.top_k * as_shares(evidence) - input_F @ self.profile.weights[layer],
                weight=tokens / self.equal_tokens,
                forgetting=self.forgetting,
                most=self.batches,
            )
        return Learned(averaged(state.average_E, evidence, self.decay), memory)

    def _tokens(self, layer: int, features: Floats) -> float:
        """Of the batch; fewer where some of their choices went to nobody."""
        return float(features.sum()) / (min(layer, self.profile.layers_back) * self.profile.top_k)
