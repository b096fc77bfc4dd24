"""Shares: each expert's part of a layer's rows, and the counts that they come from.

Shapes: T tokens, K choices a token, E experts, L MoE layers.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.predictors.predictor import Floats, Ids

Counts = NDArray[np.integer[Any]] | Floats


def choice_counts(chosen_TK: Ids, num_experts: int) -> Floats:
    """[E], how often each expert was chosen.  Ids of `num_experts` are nobody's (dropped, or padding) and don't count."""
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
