"""`strategy=search` in a run: measured, searched, walked; losses are eager's; resumed, replayed, its file taken by others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalina.config import PretrainConfig, StrategyConfig
from megalina.parallel.plan_file import PLAN_FILE, with_plan
from megalina.step.candidates import FLOW, LINA
from megalina.step.order import order_of
from megalina.step.plan import Plan
from megalina.step.strategy import training_step
from megalina.train.list_search import (
    AUTO_INSTRUCTIONS,
    FINALISTS,
    FINALS,
    SEARCHES,
    SETTLE,
    STEPS,
    WARM_UP,
    Share,
    best_plans,
    evaluations_of,
    with_own_cores,
)
from megalina.train.step_runner import StepRunner
from megalina.train.trials import Measured, Trials
from megalina.validate import check_config
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, start, write_tokens

RANKS, WALKS = 2, 320
SEARCHED = WARM_UP + STEPS + SETTLE + STEPS  # the last step before the list
MOST = SEARCHED + (SEARCHES * sum(FINALISTS) + FINALS) * (SETTLE + STEPS)  # steps until a list is chosen, at most


def searching(folder: Path, name: str, **settings: Any):
    config = config_of(folder, name, ep=2, dtype="float64", micro_batch_size=4, **settings)
    config.strategy = StrategyConfig(name="search", search_evaluations=WALKS)
    return config


def runs(folder: Path) -> dict[str, Any]:
    """Losses under eager, with a search, and of a run that is resumed; one that is replayed raises nothing."""
    steps = MOST + 4
    plain = config_of(folder, "eager", ep=2, dtype="float64", micro_batch_size=4, steps=steps)
    out: dict[str, Any] = {"eager": records_of(plain).of("loss")}
    whole = records_of(searching(folder, "whole", steps=steps, interval=MOST + 1))
    out["search"], out["plans"] = whole.of("loss"), whole.of("plan")
    saved = checkpoint(searching(folder, "whole"), MOST + 1)
    resumed = searching(folder, "resumed", steps=steps)
    again = records_of(resumed, saved)
    out["resumed"], out["plans of resumed"] = again.of("loss"), again.of("plan")
    replayed = searching(folder, "whole", steps=steps)
    replayed.train.resume = "verify"
    records_of(replayed, saved)
    out["differ"] = same_checkpoints(*(checkpoint(c, steps) for c in (resumed, searching(folder, "whole"))))
    return out


def of_packings(folder: Path) -> tuple[list[float], list[float], list[str], str]:
    """Losses, those of eager, and plans of a run under auto in whose trials packing 2 was about as fast; what it says of it."""
    settings = {"steps": 3 * MOST, "interval": 0}
    config = searching(folder, "packings", **settings)
    config.strategy = StrategyConfig(name="auto", search_evaluations=WALKS, packing="auto")
    runner = start(config).runner
    trials = runner.tuner.trials = Trials([], present=runner.trainable.plan)
    packed = {replace(LINA, packing=2): 1.5, replace(FLOW, packing=2): 1.04}
    trials.tried = {plan: Measured(s, 0.0) for plan, s in {trials.present: 1.0, **packed}.items()}
    assert runner.tuner.of_other_packings == [replace(FLOW, packing=2)]
    losses, plans = [], []
    while runner.undecided:
        plans.append(str(runner.trainable.plan))
        losses.append(runner.compute(runner.state.step + 1)[0].loss)
        runner.adapt(1.0)
    losses.append(runner.compute(runner.state.step + 1)[0].loss)
    plain = start(config_of(folder, "plain", ep=2, dtype="float64", micro_batch_size=4, **settings)).runner
    eager = [plain.compute(plain.state.step + 1)[0].loss for _ in losses]
    return losses, eager, [*plans, str(runner.trainable.plan)], runner.evidence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searching")
    write_tokens(folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(RANKS, runs, folder)


@pytest.mark.full
def test_a_run_searches_and_its_losses_are_eagers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["search"] == pytest.approx(rank["eager"], rel=1e-12)
    plans = ranks[0]["plans"]
    assert plans == ranks[1]["plans"]
    assert "order" not in plans[SEARCHED - 1] and "deferred weights of all" in plans[SEARCHED - 1]
    assert all("order" in plan for plan in plans[SEARCHED : SEARCHED + SETTLE + STEPS])
    assert len(set(plans[MOST:])) == 1 and "order" in plans[-1]


@pytest.mark.full
def test_lists_of_a_packing_that_is_about_as_fast_are_searched_too(folder: Path) -> None:
    (losses, eager, plans, evidence), (*_, others, _) = run_on_ranks(RANKS, of_packings, folder)
    assert losses == pytest.approx(eager, rel=1e-12) and plans == others
    begun = plans.index("flow: 2 parts, packing 2")
    assert begun > SEARCHED and all("packing 2" in plan for plan in plans[begun : -1 - FINALS * (SETTLE + STEPS)])
    assert any("packing 2, order" in plan for plan in plans[begun:]) and "packing 2" not in " ".join(plans[:begun])
    assert len(plans) < 3 * MOST  # nobody waits for the next look at times
    assert "order" in plans[-1] and plans[-1].split(", order")[0] in evidence


@pytest.mark.full
def test_a_resumed_run_goes_on_with_the_list_to_the_last_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed"] == rank["search"][MOST + 1 :]
        assert rank["plans of resumed"] == rank["plans"][MOST + 1 :] and rank["differ"] == []


@pytest.mark.full
def test_the_ledger_has_an_order_once(folder: Path, ranks: list[dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in (folder / "whole" / "ledger.jsonl").read_text().splitlines()]
    orders = [line["plan"]["order"] for line in lines if "order" in line["plan"]]
    assert len(orders) > STEPS and len({order["checksum"] for order in orders}) == sum("lines" in order for order in orders)


@pytest.mark.full
def test_another_run_takes_the_file_and_searches_nothing(folder: Path, ranks: list[dict[str, Any]]) -> None:
    config = searching(folder, "third")
    config.strategy.plan = str(folder / "whole" / PLAN_FILE)
    config.strategy.search_evaluations = StrategyConfig().search_evaluations
    config.train.deterministic = True
    given = with_plan(config, RANKS)
    check_config(given, RANKS)
    found = Plan.from_json(json.loads((folder / "whole" / PLAN_FILE).read_text())["plan"])
    assert (given.strategy.name, tuple(given.strategy.order.splitlines())) == (found.strategy, found.order)


def test_auto_searches_as_much_as_is_asked_for_and_in_time_or_not_at_all() -> None:
    auto = PretrainConfig(strategy=StrategyConfig(name="auto", search_evaluations=200))
    short, long, too_long = ((None,) * n for n in (AUTO_INSTRUCTIONS // 1000, AUTO_INSTRUCTIONS // 350, AUTO_INSTRUCTIONS // 299))
    assert [evaluations_of(auto, program) for program in (short, long, too_long)] == [200, 200, 0]  # type: ignore[arg-type]
    auto.strategy.search_evaluations = 32_000
    assert [evaluations_of(auto, program) for program in (short, long, too_long)] == [1000, 350, 0]  # type: ignore[arg-type]
    auto.strategy.name = "search"
    assert evaluations_of(auto, too_long) == 32_000  # type: ignore[arg-type]


def test_ranks_share_networks_first_and_then_take_other_seeds() -> None:
    of = [Share(rank, 5) for rank in range(5)]
    assert [(list(share.networks(2)), share.seed(2)) for share in of] == [([0], 0), ([1], 0), ([0], 1), ([1], 1), ([0], 2)]
    assert (list(Share(0, 1).networks(2)), Share(0, 1).seed(2)) == ([0, 1], 0)


def test_ranks_search_that_have_cores_of_their_own() -> None:
    assert with_own_cores([("a", [0, 1])] * 4) == [0, 1]  # not pinned
    assert with_own_cores([("a", [0]), ("a", [0]), ("a", [1]), ("a", [1])]) == [0, 2]
    assert with_own_cores([("a", [0]), ("a", [0]), ("b", [0]), ("b", [0])]) == [0, 2]
    assert with_own_cores([("a", list(range(64)))] * 16) == list(range(8))


def test_the_best_lists_of_all_ranks_are_measured() -> None:
    """One of the first network; of the second two, which are not in equally many parts."""
    two, four = replace(FLOW, parts=2), replace(FLOW, parts=4)
    named = {name: replace(two, order=(name,)) for name in "abcde"} | {"other": replace(four, order=("other",))}
    lists = {name: plan.as_json() for name, plan in named.items()}
    told = [
        (0, 9, [(lists["a"], 0.5)]),
        (1, 9, [(lists["b"], 0.3), (lists["other"], 0.35)]),
        (0, 9, [(lists["c"], 0.4)]),
        (1, 9, [(lists["d"], 0.31), (lists["e"], 0.33)]),
    ]
    assert best_plans(told) == [named["c"], named["b"], named["other"]]
    assert best_plans([*told[:1], *told[3:]]) == [named["a"], named["d"], named["e"]]
    assert best_plans([(0, 9, [(lists["a"], 0.5)]), (1, 9, [(lists["a"], 0.5)])]) == [named["a"]]


# auto, alone: no list is searched, and what a checkpoint brings is no other than on many ranks


@pytest.fixture
def auto(folder: Path) -> StepRunner:
    config = config_of(folder, "auto", micro_batch_size=4)
    config.strategy = StrategyConfig(name="auto")
    return start(config).runner


@pytest.mark.parametrize("searches", [0, 1])
def test_a_list_that_was_still_being_measured_is_left_and_one_that_was_chosen_is_kept(auto: StepRunner, searches: int) -> None:
    setting = auto.trainable.setting.under(FLOW)
    ordered = replace(FLOW, order=order_of(training_step(FLOW.strategy, setting)))
    auto.keep_plan({"plan": {"now": ordered.as_json(), "searches": searches}, "arithmetic": auto.state.arithmetic()})
    assert auto.trainable.plan == (ordered if searches else FLOW)
    assert auto.searching == (not searches) and auto.tuner.trials.present == FLOW  # alternatives have no order of another


def test_where_steps_have_drifted_the_list_is_left_before_all_is_tried_again(auto: StepRunner) -> None:
    tuner, rules = auto.tuner, auto.tuner.trials.rules
    tuner.trials = Trials([lambda best: [FLOW]], present=auto.trainable.plan, rules=rules)
    for _ in range(50):
        if auto.searching:
            tuner.after(1, 1.0 if auto.trainable.plan != FLOW else 0.5)
    assert not auto.searching and auto.trainable.plan == FLOW
    order = order_of(auto.trainable.program)
    auto.adopt(replace(FLOW, order=order))  # as a search of lists does
    steps = 0
    while not auto.searching:
        assert auto.trainable.plan.order == order
        tuner.after(2, 0.5 if steps < 2 * rules.watch else 2.0)
        steps += 1
    assert auto.trainable.plan == FLOW and steps > rules.cool_down * rules.watch
