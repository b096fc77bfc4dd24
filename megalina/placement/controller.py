"""The controller: what is decided of placements while a batch walks through the layers (Lina, section 5).

Phase 1: before a layer's router has spoken, plan for the rows that its experts are expected to get.  Phase 2: once it has,
plan anew where a trigger says that the expectation was wrong.  All of it follows from sums and lists that every rank has heard
alike, so every rank decides alike and nobody has to be told.  No torch, no clock.

Shapes: R ranks, each a device, N of them; E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.placement import Placement, with_few_moves
from megalina.placement.predictors.predictor import Floats, Predictor
from megalina.placement.split import device_load
from megalina.placement.triggers import Situation

Counts = NDArray[np.int64]
Planner = Callable[[Floats, int, int], Placement]
Split = Callable[[Counts, Placement], Counts]
Trigger = Callable[[Situation], bool]


@dataclass(frozen=True, slots=True)
class Policy:
    """How placements are found.  Without a planner they stay as they are, and nothing is predicted."""

    predictor: Predictor | None
    planner: Planner | None
    split: Split
    trigger: Trigger
    first_planned: int = 0  # MoE layer from which on placements are planned before the router speaks
    looks_ahead: bool = False  # the predictor wants to know what the next router would choose
    devices_alike: bool = False  # to the planner: it may be taken to other devices where that moves fewer experts
    worth: float = 0.0  # a placement is changed for what lowers the largest expected load by more than this share


@dataclass(slots=True)
class Decided:
    """Exact counts of what was decided, for one layer."""

    batches: int = 0
    planned: int = 0  # another placement before the router had spoken
    replanned: int = 0  # after it had
    not_worth: int = 0  # planned anew, to no use
    agreed: int = 0  # expectations with which the trigger was content
    rows: int = 0
    largest_load: list[int] = field(default_factory=list)  # rows of the busiest device, each batch
    mean_load: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Foreseen:
    """What is expected of a layer in one batch, and where its experts should sit for it."""

    placement: Placement
    expected_E: Floats | None = None  # shares; None: nothing is predicted
    features: Floats | None = None  # what that follows from, summed over ranks


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a layer was expected to get in one batch, and what it got."""

    layer: int
    expected_E: Floats | None  # shares; None: nothing was predicted
    count_E: Counts  # rows that the router sent to each expert
    load_N: Counts  # rows that each device computed
    replanned: bool = False
    agreed: bool = False  # the trigger was content with the expectation
    not_worth: bool = False  # planned anew, to no use


class Controller:
    """`residents`: where each MoE layer's experts sit at first.

    From batch to batch it keeps what was learned, and counts; what is decided within a batch is handed on by its caller."""

    def __init__(self, policy: Policy, residents: Sequence[Placement]):
        self.policy = policy
        self.decided = [Decided() for _ in residents]
        predictor = policy.predictor
        self._states: list[Any] = [predictor.start(layer) if predictor else None for layer in range(len(residents))]

    @property
    def learns(self) -> bool:
        return self.policy.predictor is not None

    def foresee(self, layer: int, features: Floats, present: Placement) -> Foreseen:
        """The placement for a layer, from features summed over ranks; `present` where nothing is planned or nothing gained."""
        policy = self.policy
        if policy.predictor is None:
            return Foreseen(present)
        share_E = policy.predictor.expect(layer, features, self._states[layer])
        unchanged = Foreseen(present, share_E, features)
        if policy.planner is None or layer < policy.first_planned:
            return unchanged
        if policy.worth:
            largest, mean = self._expected_load(share_E, present)
            if mean >= (1 - policy.worth) * largest:  # no plan can gain more
                return unchanged
        planned = self._planned(share_E, present)
        if policy.worth and self._expected_load(share_E, planned)[0] >= (1 - policy.worth) * largest:
            return unchanged
        if planned.slots != present.slots:
            self.decided[layer].planned += 1
        return Foreseen(planned, share_E, features)

    def decide(
        self, layer: int, count_RE: Counts, placement: Placement, expected_E: Floats | None
    ) -> tuple[Placement, Counts, Outcome]:
        """Once the router has spoken: the placement from now on, how many rows go from each rank for each expert to each device
        [R, E, N], and what came of the expectation.  `expected_E`: of one rank, for all: machines may round sums of floats in
        ways of their own; None: nothing was expected."""
        policy, note = self.policy, self.decided[layer]
        split_REN = policy.split(count_RE, placement)
        foreseen_E, replanned, agreed, not_worth = expected_E, False, False, False
        may_plan = policy.planner is not None and layer >= policy.first_planned
        if may_plan and (expected_E is not None or policy.predictor is None):
            count_E = count_RE.sum(0)
            if expected_E is None:
                expected_E = np.full(placement.num_experts, 1 / placement.num_experts)
            load_N = device_load(split_REN)
            if policy.trigger(Situation(expected_E, count_E, load_N)):
                again = self._planned(count_E.astype(np.float64), placement)
                split_again_REN = policy.split(count_RE, again)
                largest = int(device_load(split_again_REN).max())
                if policy.trigger(Situation(expected_E, count_E, load_N, largest)):  # now that what it would bring is known
                    placement, split_REN = again, split_again_REN
                    replanned = True
                else:
                    not_worth = True
            else:
                agreed = True
        load_N = device_load(split_REN)
        note.replanned += replanned
        note.not_worth += not_worth
        note.agreed += agreed
        note.batches += 1
        note.rows += int(load_N.sum())
        note.largest_load.append(int(load_N.max()))
        note.mean_load.append(float(load_N.mean()))
        outcome = Outcome(layer, foreseen_E, count_RE.sum(0), load_N, replanned, agreed, not_worth)
        return placement, split_REN, outcome

    def learn(self, layer: int, features: Floats, evidence: Floats) -> None:
        """After the batch; both summed over ranks, `features` as they were foreseen from."""
        assert self.policy.predictor is not None
        self._states[layer] = self.policy.predictor.learn(layer, features, evidence, self._states[layer])

    def _planned(self, share_E: Floats, present: Placement) -> Placement:
        assert self.policy.planner is not None
        planned = self.policy.planner(share_E, present.num_devices, present.slots_per_device)
        return with_few_moves(present, planned) if self.policy.devices_alike else planned

    def _expected_load(self, share_E: Floats, placement: Placement) -> tuple[int, float]:
        """Of the busiest device and the mean one, rows being as expected."""
        rows = 10_000 * placement.num_devices
        own_E = np.floor(share_E * (rows / placement.num_devices)).astype(np.int64)
        load_N = device_load(self.policy.split(np.tile(own_E, (placement.num_devices, 1)), placement))
        return int(load_N.max()), float(load_N.mean())
