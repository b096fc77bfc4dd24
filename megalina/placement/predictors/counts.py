"""Predictors that go by counts of rows alone, of the profile and of the batches served: by nothing of the batch itself.

What is left of an estimate when tokens' paths are not looked at.

Shapes: T tokens of a rank, K choices a token, E experts, L MoE layers.
"""

from typing import Any

import numpy as np

from megalina.placement.predictors.predictor import Counts, Floats, Ids, Seen, as_shares, check_part, choice_counts, layer_shares

Window = tuple[Floats, ...]  # counts [E] of the last batches, the latest last


class _OfCounts:
    """`counts_LE`: rows of each expert in the profile, or shares; ones for an even share.  ValueError for negative ones."""

    def __init__(self, counts_LE: Counts):
        self._share_LE = layer_shares(counts_LE)
        self.num_experts = self._share_LE.shape[1]

    def features(self, layer: int, seen: Seen) -> Floats:
        return np.zeros(0)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """[E], rows of each expert."""
        return choice_counts(chosen_TK, self.num_experts)


class StaticPredictor(_OfCounts):
    """Each layer's rows are shared as they were in the profile, or evenly, whatever the batch."""

    def start(self, layer: int) -> None:
        return None

    def expect(self, layer: int, features: Floats, state: Any) -> Floats:
        return self._share_LE[layer].copy()

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        return np.zeros(0)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Any) -> Any:
        return state


class WindowPredictor(_OfCounts):
    """Each layer's rows are shared as in the last batches, all their rows taken together.

    Good while traffic is steady; where tasks take turns it expects the one that has just been.  The profile counts until the
    first batch.  `batches`: so many are remembered; one without rows is passed over.  ValueError for negative counts, or no
    batch."""

    def __init__(self, counts_LE: Counts, *, batches: int = 1):
        if batches < 1:
            raise ValueError(f"a window of {batches} batches: take at least 1")
        super().__init__(counts_LE)
        self.batches = batches

    def start(self, layer: int) -> Window:
        return ()

    def expect(self, layer: int, features: Floats, state: Window) -> Floats:
        return as_shares(np.sum(state, axis=0)) if state else self._share_LE[layer].copy()

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Window) -> Window:
        return (*state, evidence)[-self.batches :] if evidence.any() else state


class EmaPredictor(_OfCounts):
    """Each layer's rows are shared as in the past, by an exponential moving average of the batches' shares, which begins as the
    profile.

    `decay`: what a batch leaves of the average before; one without rows leaves all of it.  ValueError for negative counts, or a
    decay outside 0 to 1."""

    def __init__(self, counts_LE: Counts, *, decay: float = 0.5):
        check_part("decay", decay)
        super().__init__(counts_LE)
        self.decay = decay

    def start(self, layer: int) -> Floats:
        return self._share_LE[layer]

    def expect(self, layer: int, features: Floats, state: Floats) -> Floats:
        return as_shares(state)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Floats) -> Floats:
        return averaged(state, evidence, self.decay)


class DistributionPredictor(EmaPredictor):
    """The profile's marginal of each layer, mixed with the running one.  `profile_part`: of the mixture; the rest is the average
    of the batches, as in `EmaPredictor`.

    ValueError for negative counts, or a part or decay outside 0 to 1."""

    def __init__(self, counts_LE: Counts, *, profile_part: float = 0.5, decay: float = 0.7):
        check_part("profile_part", profile_part)
        super().__init__(counts_LE, decay=decay)
        self.profile_part = profile_part

    def expect(self, layer: int, features: Floats, state: Floats) -> Floats:
        return as_shares(self.profile_part * self._share_LE[layer] + (1 - self.profile_part) * state)


def averaged(share_E: Floats, counts_E: Floats, decay: float) -> Floats:
    """[E], the average after a batch; as before where the batch had no rows."""
    return decay * share_E + (1 - decay) * as_shares(counts_E) if counts_E.any() else share_E
