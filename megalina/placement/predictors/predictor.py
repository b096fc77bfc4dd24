"""What a predictor is: it tells how many rows each expert of a layer will get, before that layer's router has spoken.

All of it is pure: what a predictor has learned is a value that is handed in and out, one a layer.  Ranks agree by sums: what
`features` and `evidence` say of each rank's tokens is summed over ranks, so that all expect and learn the same.

Both are vectors and should be short, a few numbers an expert: they ride with the counts of rows, which everybody waits for.

Shares are each expert's part of a layer's rows, made of counts of them.

Shapes: T tokens of a rank, K choices a token, E experts, L layers that have been routed so far, or MoE layers.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.integer[Any]]
Counts = NDArray[np.integer[Any]] | Floats


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


def choice_counts(chosen_TK: Ids, num_experts: int) -> Floats:
    """[E], how often each expert was chosen.  Ids of `num_experts` (dropped, or padding) don't count."""
    return np.bincount(chosen_TK.ravel(), minlength=num_experts + 1)[:num_experts].astype(np.float64)


def as_shares(rows_E: Floats, least: float = 0.0) -> Floats:
    """Scaled to sum 1, none below `least` times an even share before that; even where there are no rows at all.

    What is negative, as a linear map may say of an expert, counts as 0."""
    rows_E = np.maximum(rows_E, 0)
    num_experts, total = len(rows_E), float(rows_E.sum())
    if total <= 0:
        return np.full(num_experts, 1 / num_experts)
    share_E = np.maximum(rows_E / total, least / num_experts)
    return share_E / share_E.sum()


def layer_shares(counts_LE: Counts) -> Floats:
    """[L, E], each layer's as `as_shares`.  ValueError unless all are finite and none negative."""
    rows_LE = np.asarray(counts_LE, np.float64)
    if rows_LE.ndim != 2 or not rows_LE.size:
        raise ValueError(f"counts of rows must be [layers, experts], not {list(rows_LE.shape)}")
    if not np.isfinite(rows_LE).all() or rows_LE.min() < 0:
        raise ValueError(f"counts of rows must be finite and at least 0: they go from {rows_LE.min()} to {rows_LE.max()}")
    return np.stack([as_shares(rows_E) for rows_E in rows_LE])


def check_part(name: str, value: float) -> None:
    """ValueError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must be from 0 to 1")
