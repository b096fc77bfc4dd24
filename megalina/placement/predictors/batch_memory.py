"""Batch memory: the last batches a layer has served, and what they say beyond a linear map that was known before.

Each batch is one equation: its mean input times the map should have been its mean output.  The map W to go by from now on is the
one that minimises, with the map W0 from before and C, the covariance of its weights,

    sum over batches b of  weight_b |y_b - x_b W|^2  +  |C^(-1/2) (W - W0)|^2.

That is a ridge regression whose regulariser is the regression before.  W itself, [F, E], is never made: it differs from W0 by
no more than C X' gain, where gain = (X C X' + 1 / weight)^-1 (Y - X W0) is [M, E], so for M batches the price is a solve of
M x M.  A batch counts for another the more, the more alike their inputs are: where tasks take turns, it's the batches of the same
task that speak.  Old ones count less and at last are forgotten; what remains is W0, so nothing drifts away in directions that
traffic has not visited for long.

Shapes: M batches remembered, F features, E experts.
"""

from dataclasses import dataclass

import numpy as np

from megalina.placement.predictors.predictor import Floats


@dataclass(frozen=True, slots=True, eq=False)
class BatchMemory:
    """The oldest batch first."""

    spread_MF: Floats  # x C of each batch
    overlap_MM: Floats  # x C x' of each two
    error_ME: Floats  # y - x W0 of each
    weight_M: Floats
    gain_ME: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What is learned of a layer while serving."""

    average_E: Floats  # of the batches' shares, for where the memory says nothing: of the first layer, or where nothing was asked
    memory: BatchMemory


def empty_memory(num_features: int, num_experts: int) -> BatchMemory:
    return BatchMemory(
        np.zeros((0, num_features)), np.zeros((0, 0)), np.zeros((0, num_experts)), np.zeros(0), np.zeros((0, num_experts))
    )


def remembered(
    memory: BatchMemory,
    input_F: Floats,
    spread_F: Floats,
    error_E: Floats,
    *,
    weight: float,
    forgetting: float,
    most: int,
) -> BatchMemory:
    """With one batch more: its mean input x, x C, its error y - x W0 and its weight.

    Weights of those before are first multiplied by `forgetting`; no more than the last `most` are kept."""
    first = max(0, len(memory.weight_M) + 1 - most)
    overlap_M = memory.spread_MF[first:] @ input_F
    overlap_MM = np.block([[memory.overlap_MM[first:, first:], overlap_M[:, None]], [overlap_M, spread_F @ input_F]])
    error_ME = np.concatenate([memory.error_ME[first:], error_E[None]])
    weight_M = np.append(memory.weight_M[first:] * forgetting, weight)
    # scaled by the root of the weights, so that it stays well conditioned when a weight has all but vanished
    root_M = np.sqrt(weight_M)
    scaled_MM = np.eye(len(root_M)) + root_M[:, None] * overlap_MM * root_M
    gain_ME = root_M[:, None] * np.linalg.solve(scaled_MM, root_M[:, None] * error_ME)
    return BatchMemory(np.concatenate([memory.spread_MF[first:], spread_F[None]]), overlap_MM, error_ME, weight_M, gain_ME)


def correction(memory: BatchMemory, input_F: Floats) -> Floats:
    """[E], x (W - W0) of a batch with mean input x: what is to be added to x W0."""
    return (memory.spread_MF @ input_F) @ memory.gain_ME
