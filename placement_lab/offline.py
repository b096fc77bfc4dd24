"""Offline replay: what a policy would have done with batches whose routing is known, and how even devices' loads would be.

The decisions are those of `Controller`, asked in the same order and told the same sums as in serving: ranks are equal slices of
a batch, what they say is summed, experts stay where the last decision has put them.  No weights, no torch, no clock.

Shapes: B batches, T tokens of a batch, L MoE layers, K choices a token, R ranks, each a device, N of them; E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalina.placement.controller import Controller, Counts, Policy
from megalina.placement.placement import Placement, aligned, moved
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.predictor import Floats, Ids, Predictor, Seen, choice_counts
from megalina.placement.routing_trace import counts_of
from megalina.placement.split import device_load


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """What became of each layer of each batch."""

    counts_BLE: Counts  # rows that the router sent to each expert
    load_BLN: Counts  # rows that each device computed
    local_BL: Counts  # of them, those that came from the device's own rank
    moved_BL: Counts  # slots of all devices that had to be filled with another expert
    replanned_BL: NDArray[np.bool_]  # whether another placement was taken once the router had spoken
    expected_BLE: Floats | None  # shares; None where nothing is predicted


@dataclass(frozen=True, slots=True)
class Balance:
    """The busiest device's rows over the mean device's, over batches and layers; 1 is perfect."""

    median: float
    p95: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Means over batches and layers of how near an expectation came."""

    same_list: float  # share of the cases in which the ordered lists of the 2 K most popular experts were the same (Lina, 7.3)
    recall: float  # share of the K most popular experts that are among the K expected to be
    misordered: float  # experts whose place in the order of all experts, by popularity, was another (Lina, 7.3)
    distance: float  # L1, of shares: 0 to 2


def replay(
    batches: Sequence[Ids],
    policy: Policy,
    *,
    num_experts: int,
    num_devices: int,
    slots_per_device: int,
    ahead: Sequence[Ids] | None = None,
) -> Replay:
    """Serve the batches, [T, L, K] each, one after another; experts sit in blocks at first, as training had them.

    `ahead`: of the same tokens, what routers say ahead; only a policy that looks ahead gets it.
    ValueError where there is no batch, a batch has fewer tokens than there are devices, experts lack room, or a policy looks
    ahead and there is nothing, or something else, to be seen."""
    if not batches:
        raise ValueError("there is no batch to replay")
    if (least := min(len(ids_TLK) for ids_TLK in batches)) < num_devices:
        raise ValueError(f"a batch of {least} tokens can't be shared by {num_devices} devices: serve larger batches, or on fewer")
    shapes, ahead_shapes = ([ids_TLK.shape for ids_TLK in of] for of in (batches, ahead or ()))
    if policy.looks_ahead and shapes != ahead_shapes:
        raise ValueError(
            f"a policy that looks ahead needs ahead ids of {len(shapes)} batches, each of the shape of its choices: there are "
            f"{len(ahead_shapes)}" + (", of other shapes" if len(ahead_shapes) == len(shapes) else "")
        )
    num_layers = batches[0].shape[1]
    present = [identity(np.ones(num_experts), num_devices, slots_per_device)] * num_layers
    predictor, controller = policy.predictor, Controller(policy, present)
    expected: list[Floats] = []
    load_BLN = np.zeros((len(batches), num_layers, num_devices), np.int64)
    local_BL, moved_BL = np.zeros((2, len(batches), num_layers), np.int64)
    replanned_BL = np.zeros((len(batches), num_layers), np.bool_)
    for batch, ids_TLK in enumerate(batches):
        by_rank = _by_rank(ids_TLK, num_devices)
        ahead_by_rank = _by_rank(ahead[batch], num_devices) if ahead is not None and policy.looks_ahead else None
        all_features: list[Floats] = []
        for layer in range(num_layers):
            before, expected_E = present[layer], None
            if predictor is not None:
                told_ahead = None
                if ahead_by_rank is not None:
                    told_ahead = [choice_counts(said[layer], num_experts) for said in ahead_by_rank]
                features = _summed_features(predictor, layer, by_rank, told_ahead)
                all_features.append(features)
                planned = controller.foresee(layer, features, before)
                present[layer], expected_E = _installed(before, planned.placement), planned.expected_E
            count_RE = np.stack([np.bincount(chosen[layer].ravel(), minlength=num_experts) for chosen in by_rank])
            foreseen = present[layer]
            if expected_E is not None:
                expected.append(expected_E)
            decided, split_REN, _ = controller.decide(layer, count_RE, foreseen, expected_E)
            present[layer] = _installed(foreseen, decided)
            replanned_BL[batch, layer] = decided is not foreseen
            load_BLN[batch, layer] = device_load(split_REN)
            local_BL[batch, layer] = split_REN.sum(1).trace()
            moved_BL[batch, layer] = moved(before, foreseen) + moved(foreseen, present[layer])
        if predictor is not None:
            for layer, features in enumerate(all_features):
                told = [predictor.evidence(layer, Seen(chosen[:layer]), chosen[layer]) for chosen in by_rank]
                controller.learn(layer, features, sum(told[1:], told[0]))
    return Replay(
        counts_of_batches(batches, num_experts),
        load_BLN,
        local_BL,
        moved_BL,
        replanned_BL,
        np.array(expected).reshape(len(batches), num_layers, num_experts) if expected else None,
    )


def counts_of_batches(batches: Sequence[Ids], num_experts: int) -> Counts:
    """[B, L, E], rows of each expert: what an oracle knows."""
    return np.stack([counts_of(ids_TLK, num_experts) for ids_TLK in batches])


def max_over_mean(load_BLN: Counts) -> Floats:
    """[B, L], the busiest device's rows over the mean device's."""
    ratio_BL: Floats = load_BLN.max(axis=-1) / load_BLN.mean(axis=-1)
    return ratio_BL


def balance(ratio_BL: Floats) -> Balance:
    """The median and the 95th percentile of all."""
    return Balance(float(np.median(ratio_BL)), float(np.percentile(ratio_BL, 95)))


def accuracy(expected_BLE: Floats, counts_BLE: Counts, top_k: int) -> Accuracy:
    """How near the expected shares came to the rows; of experts that are as popular the lower one comes first."""
    num_experts = counts_BLE.shape[-1]
    expected_XE, counts_XE = expected_BLE.reshape(-1, num_experts), counts_BLE.reshape(-1, num_experts).astype(np.float64)
    orders = [np.argsort(-popularity_XE, axis=1, kind="stable") for popularity_XE in (expected_XE, counts_XE)]
    listed = min(2 * top_k, num_experts)
    same_list = (orders[0][:, :listed] == orders[1][:, :listed]).all(axis=1).mean()
    top_XE = [(np.argsort(order_XE, axis=1) < top_k) for order_XE in orders]
    recall = (top_XE[0] & top_XE[1]).sum(axis=1).mean() / top_k
    misordered = (orders[0] != orders[1]).sum(axis=1).mean()
    shares = [popularity_XE / popularity_XE.sum(axis=1, keepdims=True) for popularity_XE in (expected_XE, counts_XE)]
    distance = np.abs(shares[0] - shares[1]).sum(axis=1).mean()
    return Accuracy(float(same_list), float(recall), float(misordered), float(distance))


def _by_rank(ids_TLK: Ids, num_devices: int) -> list[tuple[Ids, ...]]:
    """Of each rank's part of a batch [T, K] of each layer."""
    return [tuple(np.moveaxis(part_TLK, 1, 0)) for part_TLK in np.array_split(ids_TLK, num_devices)]


def _summed_features(
    predictor: Predictor, layer: int, by_rank: Sequence[tuple[Ids, ...]], told_ahead: Sequence[Floats] | None
) -> Floats:
    """As ranks hear them of each other; before the first layer there is nothing to be told."""
    if layer == 0:
        return predictor.features(0, Seen(()))
    ahead: Sequence[Floats | None] = told_ahead or [None] * len(by_rank)
    features = [predictor.features(layer, Seen(chosen[:layer], said_E)) for chosen, said_E in zip(by_rank, ahead, strict=True)]
    return sum(features[1:], features[0])


def _installed(present: Placement, wanted: Placement) -> Placement:
    """Experts that stay on a device keep their slot."""
    return present if wanted is present else aligned(present, wanted)
