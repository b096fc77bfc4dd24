"""The controller: what is planned when, from what all ranks have heard alike."""

from typing import Any

import numpy as np
import pytest

from megalina.placement.controller import Controller, Policy
from megalina.placement.placement import Placement
from megalina.placement.planners.greedy import greedy
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.counts import WindowPredictor
from megalina.placement.split import device_load, even, load_aware
from megalina.placement.triggers import GainAboveCost, Situation, always, never

EXPERTS, DEVICES, SLOTS, LAYERS = 4, 2, 3, 2
RESIDENT = identity(np.ones(EXPERTS), DEVICES, SLOTS)
SKEWED = np.array([[9, 1, 1, 1], [9, 1, 1, 1]])


def controller(**policy: Any) -> Controller:
    settings: dict[str, Any] = {"predictor": WindowPredictor(np.ones((LAYERS, EXPERTS))), "planner": greedy, "split": even}
    return Controller(Policy(**{**settings, "trigger": never, **policy}), [RESIDENT] * LAYERS)


def serve(c: Controller, layer: int, count_RE: np.ndarray[Any, Any]) -> Placement:
    planned = c.foresee(layer, np.zeros(0), RESIDENT)
    placement, split_REN, _ = c.decide(layer, count_RE, planned.placement, planned.expected_E)
    assert (split_REN.sum(2) == count_RE).all()
    c.learn(layer, np.zeros(0), count_RE.sum(0).astype(float))
    return placement


def test_without_a_predictor_or_a_planner_everything_stays() -> None:
    c = controller(predictor=None, planner=None)
    planned = c.foresee(0, np.zeros(0), RESIDENT)
    assert planned.placement is RESIDENT and planned.expected_E is None
    placement, split_REN, _ = c.decide(0, SKEWED, RESIDENT, None)
    assert placement is RESIDENT and device_load(split_REN).tolist() == [20, 4]
    assert c.decided[0].largest_load == [20] and c.decided[0].mean_load == [12.0] and c.decided[0].rows == 24


def test_what_is_learned_of_a_batch_is_planned_for_in_the_next() -> None:
    c = controller()
    first, second = serve(c, 0, SKEWED[:, ::-1]), serve(c, 0, SKEWED[:, ::-1])  # to the last expert
    assert len(first.copies()[3]) == 1 and second.copies()[3] == (0, 1)
    assert c.decided[0].largest_load[1] < c.decided[0].largest_load[0]
    assert c.decided[1].batches == 0 and c.decided[0].planned >= 1


def test_layers_before_the_first_planned_are_left_alone() -> None:
    c = controller(first_planned=1, trigger=always)
    for _ in range(2):
        assert serve(c, 0, SKEWED) is RESIDENT
    serve(c, 1, SKEWED)
    assert c.decided[0].planned == c.decided[0].replanned == 0 < c.decided[1].replanned


def test_phase_2_plans_from_the_real_counts() -> None:
    c = controller(trigger=always)
    assert serve(c, 0, SKEWED).copies()[0] == (0, 1) and c.decided[0].replanned == 1
    c = controller(predictor=None, trigger=always)  # no estimate at all
    placement, split_REN, _ = c.decide(0, SKEWED, RESIDENT, None)
    assert placement.copies()[0] == (0, 1) and device_load(split_REN).max() <= 13


def test_a_plan_is_followed_only_if_it_brings_what_it_costs() -> None:
    asked: list[Situation] = []

    def gain(situation: Situation) -> bool:
        asked.append(situation)
        return GainAboveCost(row_s=1.0, replan_s=7.0)(situation)

    c = controller(predictor=None, trigger=gain)
    placement, *_ = c.decide(0, SKEWED, RESIDENT, None)
    assert [s.replanned_load for s in asked] == [None, 12] and placement is not RESIDENT  # 20 rows become 12
    c = controller(predictor=None, trigger=GainAboveCost(row_s=1.0, replan_s=8.0))
    assert c.decide(0, SKEWED, RESIDENT, None)[0] is RESIDENT and c.decided[0].replanned == 0


def test_a_plan_that_gains_too_little_is_not_followed() -> None:
    expected = np.array([0.3, 0.25, 0.25, 0.2])
    for worth, moves in ((0.0, True), (0.5, False)):
        c = controller(predictor=WindowPredictor(np.tile(expected, (LAYERS, 1))), worth=worth, split=load_aware)
        assert (c.foresee(0, np.zeros(0), RESIDENT).placement is not RESIDENT) == moves


def test_all_ranks_decide_alike_even_where_one_expects_otherwise() -> None:
    c, d = controller(trigger=always), controller(trigger=always)
    mine, _ = (each.foresee(0, np.zeros(0), RESIDENT).expected_E for each in (c, d))
    assert mine is not None
    a, b = c.decide(0, SKEWED, RESIDENT, mine), d.decide(0, SKEWED, RESIDENT, mine)
    assert a[0] == b[0] and (a[1] == b[1]).all()


@pytest.mark.parametrize("count_RE", [np.zeros((2, 4), int), np.array([[0, 0, 0, 0], [5, 0, 0, 1]])])
def test_ranks_without_rows_are_no_exception(count_RE: np.ndarray[Any, Any]) -> None:
    c = controller(trigger=GainAboveCost(1.0, 0.0))
    serve(c, 0, count_RE)
    assert c.decided[0].rows == count_RE.sum()
