"""Trials choose from measurements: the fastest by more than noise, without going back and forth, alike on all ranks."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.mesh import build_mesh
from megalina.step.plan import Plan
from megalina.train.trials import Measured, Rules, Trials, Tuner, evidence
from tests.profiles import examples

NUMBERS = (1, 2, 4, 8)
RULES = Rules()
HYSTERESIS = Rules(gain=0.03)


def trials(options: Sequence[int] = NUMBERS, *, present: int = 1, rules: Rules = RULES, searches: int = 0) -> Trials[int]:
    """One question; a higher number costs more."""
    asked = [lambda best: options] if len(options) > 1 else []
    return Trials(asked, present=present, rules=rules, searches=searches, cost_of=float)


def steady(times_s: dict[int, float], error: float = 0.0) -> Callable[[int], Measured]:
    return lambda option: Measured(times_s[option], error * times_s[option])


def run(found: Trials[int], measure: Callable[[int], Measured], looks: int = 60) -> list[int]:
    """The option after each measurement."""
    return [found.observe(measure(found.present)) for _ in range(looks)]


def changes(options: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(options, options[1:], strict=False))


# decisions


def test_each_is_tried_and_the_fastest_kept_for_good() -> None:
    found = trials()
    seen = run(found, steady({1: 1.0, 2: 0.8, 4: 0.6, 8: 0.9}))
    assert seen[:6] == [2, 4, 8, 1, 4, 4]  # 1 is measured again before it is left, and 4 before it is kept
    assert set(seen[4:]) == {4} and found.searches == 1


def test_what_is_not_faster_by_more_than_the_hysteresis_is_left_alone() -> None:
    seen = run(trials(rules=HYSTERESIS), steady({1: 1.0, 2: 0.99, 4: 0.975, 8: 1.2}))
    assert seen[:3] == [2, 4, 8] and set(seen[3:]) == {1}


def test_what_is_not_faster_by_more_than_the_noise_is_left_alone() -> None:
    times_s = {1: 1.0, 2: 0.9, 4: 1.0, 8: 1.0}
    assert run(trials(), steady(times_s, 0.01))[-1] == 2
    assert run(trials(), steady(times_s, 0.05))[-1] == 1


def test_of_two_that_are_as_fast_the_one_that_costs_less_is_taken() -> None:
    assert run(trials(), steady({1: 1.0, 2: 0.8, 4: 0.79, 8: 0.789}))[-1] == 2


def test_a_burst_of_noise_while_the_first_was_measured_moves_nobody() -> None:
    measured = iter([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # 1 seems slow, then all are as fast
    seen = run(trials(), lambda option: Measured(next(measured, 1.0), 0.0))
    assert seen[:6] == [2, 4, 8, 1, 2, 1] and seen[-1] == 1


def test_a_lucky_measurement_is_tried_once_more_beside_the_others_that_came_out_well() -> None:
    times_s = {1: [1.0, 1.0], 2: [0.52, 0.5], 4: [0.5, 0.6], 8: [0.9]}
    rules = Rules(finalists=2)
    found = trials(rules=rules)
    seen = run(found, lambda option: Measured(times_s[option].pop(0), 0.0), looks=7)
    assert seen == [2, 4, 8, 1, 4, 2, 2]


def test_later_questions_are_about_the_best_so_far() -> None:
    found: Trials[str] = Trials([lambda best: ["b", "c"], lambda best: [f"{best}1", f"{best}2"]], present="a")
    times_s = {"a": 1.0, "b": 0.9, "c": 0.8, "c1": 0.85, "c2": 0.7}
    seen = [found.observe(Measured(times_s[found.present], 0.0)) for _ in range(7)]
    assert seen == ["b", "c", "c1", "c2", "a", "c2", "c2"] and not found.searching


def test_the_way_back_where_the_times_have_drifted() -> None:
    before, after = {1: 1.0, 2: 0.8, 4: 0.6, 8: 0.9}, {1: 0.5, 2: 0.8, 4: 0.95, 8: 1.2}
    found = trials()
    assert run(found, steady(before), looks=10)[-1] == 4
    assert run(found, steady(after), looks=60)[-1] == 1 and found.searches == 2


def test_one_odd_look_is_no_drift_and_a_search_is_followed_by_a_rest() -> None:
    found = trials((1, 2))
    assert run(found, steady({1: 1.0, 2: 2.0}), looks=3)[-1] == 1 and found.searches == 1
    times_s = [2.0, 1.0] * 30
    assert all(found.observe(Measured(t, 0.0)) == 1 for t in times_s) and found.searches == 1
    found = trials((1, 2))
    run(found, steady({1: 1.0, 2: 2.0}), looks=3)
    looks = 0
    while not found.searching:
        found.observe(Measured(9.0, 0.0))
        looks += 1
    assert looks == RULES.cool_down


def test_after_the_last_search_nothing_is_measured_any_more() -> None:
    found = trials((1, 2))
    for number in range(300):
        found.observe(Measured(1.0 + number, 0.0))
    assert found.done and found.searches == RULES.max_searches
    assert trials((4,), present=4).done and trials(present=4, searches=RULES.max_searches).done


def test_a_resumed_run_goes_on_as_it_is() -> None:
    assert set(run(trials(present=4, searches=1), steady({1: 0.1, 2: 1.0, 4: 1.0, 8: 1.0}))) == {4}


@examples(1.5)
@given(
    seed=st.integers(0, 2**32),
    spread=st.floats(0.0, 5.0),
    error=st.floats(0.0, 0.5),
    options=st.sampled_from([(1,), (1, 2), (1, 2, 4), NUMBERS]),
)
def test_whatever_is_measured_changes_are_few_searches_rest_and_ranks_agree(
    seed: int, spread: float, error: float, options: tuple[int, ...]
) -> None:
    random = Random(seed)
    ranks = [trials(options) for _ in range(2)]
    seen, searching = [1], []
    for _ in range(400):
        time_s = random.lognormvariate(0.0, spread)
        searching.append(ranks[0].searching)
        decided = [c.observe(Measured(time_s, error * time_s)) for c in ranks]
        assert decided[0] == decided[1] and decided[0] in options
        seen.append(decided[0])
    assert changes(seen) <= RULES.max_searches * (len(options) + 2)
    for is_search, looks in groupby(searching):
        assert is_search or len(list(looks)) >= RULES.cool_down
    assert all(is_search or a == b for is_search, a, b in zip(searching, seen, seen[1:], strict=False))


@examples(1.5)
@given(
    data=st.data(), times_s=st.fixed_dictionaries({k: st.floats(0.1, 10.0) for k in NUMBERS}), present=st.sampled_from(NUMBERS)
)
def test_under_steady_noise_it_changes_in_one_search_alone_and_never_for_the_worse(
    data: st.DataObject, times_s: dict[int, float], present: int
) -> None:
    noise = 0.1

    def measure(option: int) -> Measured:
        return Measured(times_s[option] * (1 + data.draw(st.floats(-noise, noise))), 0.0)

    found = trials(present=present)
    seen = run(found, measure, looks=30)
    assert found.searches == 1 and len(set(seen[6:])) == 1
    assert times_s[seen[-1]] <= times_s[present] * (1 + noise) / (1 - noise)


# measurements


def test_the_median_is_deaf_to_one_slow_step() -> None:
    assert Measured.of([1.0, 1.0, 9.0, 1.0, 1.0]) == Measured(1.0, 0.0)
    noisy = Measured.of([1.0, 1.1, 0.9, 1.05, 0.95])
    assert noisy.typical_s == 1.0 and 0.02 < noisy.error_s < 0.1
    assert Measured.of_few([1.4, 1.0]).typical_s == 1.0 and Measured.of_few([1.4, 1.0]).error_s > 0
    assert Measured.slowest([Measured(1.0, 0.3), Measured(2.0, 0.1)]) == Measured(2.0, 0.3)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megalina")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_tuner_leaves_out_first_steps_and_says_once_what_it_found(logged: list[str]) -> None:
    one, two = Plan("lina"), Plan("lina", packing=2)
    present, log = [one], []

    def adopt(plan: Plan) -> None:
        log.append((step, plan))
        present[0] = plan

    tuner = Tuner(Trials([lambda best: [two]], present=one), build_mesh(), adopt, note="; a note")
    since = 0
    for step in range(1, 400):
        slow = since < (RULES.warm_up_steps if not log else RULES.settle_steps)  # the first steps of each
        before = present[0]
        tuner.after(step, 50.0 if slow else {one: 1.0, two: 0.7}[before])
        since = since + 1 if present[0] == before else 0
    first, trial = RULES.warm_up_steps + RULES.window, RULES.settle_steps + RULES.window
    assert log == [(first, two), (first + trial, one), (first + 2 * trial, two)]
    assert len(logged) == 1 and f"plan from step {first + 3 * trial + 1} on: lina: packing 2" in logged[0]
    assert "700.0 ms lina: packing 2; 1000.0 ms lina;" in logged[0] and logged[0].endswith("noise; a note)")


def test_the_evidence_is_one_line() -> None:
    found: Trials[Plan] = Trials([lambda best: [Plan("flow", parts=2)]], present=Plan())
    found.observe(Measured(1.0, 0.0))
    assert "\n" not in evidence(found, 7) and "plan from step 8 on: flow: 2 parts (" in evidence(found, 7)
