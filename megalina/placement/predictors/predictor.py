"""What a predictor is: it tells how many rows each expert of a layer will get, before that layer's router has spoken.

All of it is pure: what a predictor has learned is a value that is handed in and out, one a layer.  Ranks agree by sums: what
`features` and `evidence` say of each rank's tokens is summed over ranks, so that all expect and learn the same.

Both are vectors and should be short, a few numbers an expert: they ride with the counts of rows, which everybody waits for.

Shapes: T tokens of a rank, K choices a token, E experts, L layers that have been routed so far.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rank knows of a batch's own tokens before a layer's router has spoken."""

    chosen: tuple[Ids, ...]  # [T, K] of each earlier MoE layer, the first layer's first; tokens in the same order in all
    ahead_E: Floats | None = None  # rows each expert would get from this layer's router on the last layer's hidden state


class Predictor(Protocol):
    """`layer` counts MoE layers from 0."""

    def start(self, layer: int) -> Any:
        """What is known before the first batch: from the profile, if there is one."""

    def features(self, layer: int, seen: Seen) -> Floats:
        """What this rank's tokens say; of fixed shape for a layer, also without a token.  Summed over ranks."""

    def expect(self, layer: int, features: Floats, state: Any) -> Floats:
        """[E], expected share of the layer's rows; at least 0, sum 1."""

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        """What is to be learned from this rank's tokens, now that the router has spoken.  Summed over ranks."""

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Any) -> Any:
        """The state for the next batch."""
