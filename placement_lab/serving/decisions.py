"""What an engine decides of placements while it serves batches whose routing is known, and who sends how many rows where.

Decisions are those of `Controller`, asked in the engine's order and told the same sums: what each rank says of its own tokens,
summed over ranks.  None of them depends on time, so they are known before a batch is walked in virtual time.

Shapes: T tokens of a batch, L MoE layers, K choices a token, E experts, R ranks, each a device, N of them, S slots of a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.chosen_slots import chosen_slots, first_slots, rows_once
from megalina.placement.controller import Controller, Counts, Outcome, Policy
from megalina.placement.placement import EMPTY, Placement, aligned
from megalina.placement.predictors.predictor import Floats, Ids, Predictor, Seen, choice_counts
from placement_lab.workloads import own_part

FIXED_NUMBERS = 2  # told besides counts: whether a fetch did not come, and a fingerprint of the plan


@dataclass(frozen=True, slots=True, eq=False)
class ServedBatch:
    """Which experts each token chooses, [T, L, K], tokens of rank 0 first, best choice first; E is nobody.

    `tokens_R`: of each rank.  ValueError where they don't sum to T."""

    ids_TLK: Ids
    tokens_R: Counts

    def __post_init__(self) -> None:
        if self.ids_TLK.ndim != 3 or int(self.tokens_R.sum()) != len(self.ids_TLK):
            raise ValueError(f"{self.tokens_R.sum()} tokens of {len(self.tokens_R)} ranks, but ids are {self.ids_TLK.shape}")


def shared_evenly(ids_TLK: Ids, num_devices: int) -> ServedBatch:
    """Ranks have equal parts; of a rest the first ranks have one token more each."""
    least, more = divmod(len(ids_TLK), num_devices)
    return ServedBatch(ids_TLK, least + (np.arange(num_devices) < more).astype(np.int64))


def even_choices(batch: ServedBatch, num_experts: int) -> ServedBatch:
    """The same tokens, sent to experts in turn: choice k of token t goes to expert (t K + k) mod E, in all layers."""
    tokens, layers, top_k = batch.ids_TLK.shape
    turn_TK = (np.arange(tokens)[:, None] * top_k + np.arange(top_k)) % num_experts
    return replace(batch, ids_TLK=np.broadcast_to(turn_TK[:, None], (tokens, layers, top_k)))


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What was decided of a MoE layer in one batch."""

    layer: int  # among MoE layers
    placement: Placement  # by which rows are sent
    rows_RNS: Counts  # from each rank to each slot of each device
    fetched_N: Counts  # experts that each device fetches before the router speaks: behind what is computed
    fetched_again_N: Counts  # after it has: everything waits for them
    planned: bool  # the planner was asked before the router had spoken
    outcome: Outcome  # of phase 2
    told_numbers: int  # float64, of each rank, before rows travel
    chosen_R: Sequence[Ids]  # [T, K] of each rank's tokens
    split_REN: Counts  # rows of each rank for each expert, to each device

    @property
    def agreed(self) -> bool:
        """Phase 2 was content with the expectation."""
        return self.outcome.agreed

    @property
    def replanned(self) -> bool:
        """Phase 2 took another placement."""
        return self.outcome.replanned

    @property
    def in_vain(self) -> bool:
        """Phase 2 planned anew, and it was not worth it."""
        return self.outcome.not_worth

    @property
    def load_N(self) -> Counts:
        """Rows that each device computes."""
        load_N: Counts = self.rows_RNS.sum((0, 2))
        return load_N

    def sent_RN(self, slots: range) -> Counts:
        """Rows from each rank to these slots of each device."""
        sent_RN: Counts = self.rows_RNS[:, :, slots.start : slots.stop].sum(2)
        return sent_RN

    def once_RN(self) -> Counts:
        """Tokens of each rank that have a choice on each device: rows, where they travel once."""
        placement, slot_EN = self.placement, first_slots(self.placement)
        devices, slots = placement.num_devices, placement.slots_per_device
        slot_RTK = [
            chosen_slots(ids, split_EN, slot_EN, devices * slots)
            for ids, split_EN in zip(self.chosen_R, self.split_REN, strict=True)
        ]
        return np.stack([rows_once(slot_TK, devices, slots) for slot_TK in slot_RTK])


class Decider:
    """Serves one batch after another.  `residents`: where each MoE layer's experts sit at first.

    ValueError for a policy that looks ahead: a replay has no hidden states that a router could be asked about."""

    def __init__(self, policy: Policy, residents: Sequence[Placement]):
        if policy.looks_ahead:
            raise ValueError("a replay has no hidden states, so look-ahead predictors can't be simulated: choose another one")
        self.controller = Controller(policy, residents)
        self.present = list(residents)

    def decide(self, batch: ServedBatch) -> list[Decision]:
        """Of each MoE layer.  ValueError for a batch of other layers or ranks."""
        layers, ranks = batch.ids_TLK.shape[1], len(batch.tokens_R)
        if (layers, ranks) != (len(self.present), self.present[0].num_devices):
            there = f"{len(self.present)} placements on {self.present[0].num_devices} devices"
            raise ValueError(f"a batch of {layers} MoE layers and {ranks} ranks, but there are {there}")
        predictor = self.controller.policy.predictor
        ids_LTK = np.ascontiguousarray(np.moveaxis(batch.ids_TLK, 1, 0), np.int64)  # as it is counted: many times over
        chosen_R = [tuple(ids_LTK[:, own_part(batch.tokens_R, rank)]) for rank in range(ranks)]
        features, out = self._features(0, chosen_R), []
        all_features: list[Floats | None] = []
        for layer in range(layers):
            evidence = None if predictor is None else _evidence(predictor, layer, chosen_R)
            following = self._features(layer + 1, chosen_R) if layer + 1 < layers else None
            told = sum(len(v) for v in (evidence, following) if v is not None)
            out.append(self._layer(layer, features, chosen_R, told))
            all_features.append(features)
            features = following
        for layer, known in enumerate(all_features):
            if predictor is not None and known is not None:
                self.controller.learn(layer, known, _evidence(predictor, layer, chosen_R))
        return out

    def _features(self, layer: int, chosen_R: Sequence[tuple[Ids, ...]]) -> Floats | None:
        """As ranks hear them of each other; before the first layer there is nothing to be told."""
        predictor = self.controller.policy.predictor
        if predictor is None:
            return None
        if layer == 0:
            return predictor.features(0, Seen(()))
        found = [predictor.features(layer, Seen(chosen[:layer])) for chosen in chosen_R]
        return np.stack(found).sum(0)

    def _layer(self, layer: int, features: Floats | None, chosen_R: Sequence[tuple[Ids, ...]], told: int) -> Decision:
        controller, policy = self.controller, self.controller.policy
        before, expected_E = self.present[layer], None
        if features is not None:
            planned = controller.foresee(layer, features, before)
            self.present[layer], expected_E = _installed(before, planned.placement), planned.expected_E
        foreseen = self.present[layer]
        count_RE = np.stack([choice_counts(chosen[layer], before.num_experts) for chosen in chosen_R]).astype(np.int64)
        decided, split_REN, outcome = controller.decide(layer, count_RE, foreseen, expected_E)
        self.present[layer] = _installed(foreseen, decided)
        return Decision(
            layer,
            self.present[layer],
            _by_slot(split_REN, self.present[layer]),
            _fetched(before, foreseen),
            _fetched(foreseen, self.present[layer]),
            planned=features is not None and policy.planner is not None and layer >= policy.first_planned,
            outcome=outcome,
            told_numbers=before.num_experts * (1 if expected_E is None else 2) + FIXED_NUMBERS + told,
            chosen_R=[chosen[layer] for chosen in chosen_R],
            split_REN=split_REN,
        )


def _evidence(predictor: Predictor, layer: int, chosen_R: Sequence[tuple[Ids, ...]]) -> Floats:
    return np.stack([predictor.evidence(layer, Seen(chosen[:layer]), chosen[layer]) for chosen in chosen_R]).sum(0)


def _installed(present: Placement, wanted: Placement) -> Placement:
    """Experts that stay on a device keep their slot."""
    return present if wanted is present else aligned(present, wanted)


def _fetched(before: Placement, after: Placement) -> Counts:
    """[N], slots of each device that must be filled anew."""
    slots_NS, was_NS = np.asarray(after.slots), np.asarray(before.slots)
    fetched_N: Counts = ((slots_NS != was_NS) & (slots_NS != EMPTY)).sum(1)
    return fetched_N


def _by_slot(split_REN: Counts, placement: Placement) -> Counts:
    """[R, N, S].  Of two slots of a device with the same expert the first has the rows, as in the engine."""
    slots_NS: NDArray[Any] = np.asarray(placement.slots)
    first_NS = np.array([[slot != EMPTY and i == slots.index(slot) for i, slot in enumerate(slots)] for slots in placement.slots])
    rows_RNS: Counts = split_REN[:, np.where(first_NS, slots_NS, 0), np.arange(len(slots_NS))[:, None]] * first_NS
    return rows_RNS
