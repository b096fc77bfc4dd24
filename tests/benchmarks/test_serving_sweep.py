"""Points of a map: made routing is as skewed as asked, modes stand in their order, verdicts and tables say what was found."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.figure import Cell, columns_of, draw, text_of
from benchmarks.serving.measured import (
    ATTENTION_S,
    EXPERTS_S,
    MEASURED,
    Measured,
    Replayed,
    fitted_host_s,
    replayed,
    table,
)
from benchmarks.serving.routing import NEAR, topic_routing
from benchmarks.serving.sweep import (
    IDEAL,
    LAYERS,
    ORACLE,
    STATIC,
    Hardware,
    Load,
    Modes,
    ModeTime,
    Verdict,
    mode_times,
    resident,
    verdict,
)
from benchmarks.serving.tables import Point, map_table, modes_table, plan_table, slots_table, swap_table
from megalina.compose import compose
from megalina.config import InferConfig, ModelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.placement.placement import EMPTY
from megalina.placement.routing_trace import counts_of, traced
from megalina.serve.modes import read_mode
from placement_lab.serving.simulator import PlannerSeconds

CONF = Path(__file__).resolve().parents[2] / "conf" / "infer"
PROFILE = InferConfig(name="profile", predictor="static", planner="greedy", split="load_aware")
MODES = {"profile": PROFILE, **{name: read_mode(CONF, name) for name in ("window", "lina", "best")}}
LOAD = Load(num_experts=16, top_k=2, num_devices=8, device_tokens=256, slots=3, skew=3.0)


# made routing


def distances(skew: float, *, turns: bool) -> tuple[float, float]:
    """L1 of shares between a batch of 1,024 tokens and the next, and the one after that."""
    batches = topic_routing(64, 6, 3, skew).batches(6, tokens=1024, num_devices=8, seed=1, turns=turns)
    counts = [counts_of(batch.ids_TLK, 64) for batch in batches]
    shares = [count_LE / count_LE.sum(1, keepdims=True) for count_LE in counts]

    def between(apart: int) -> float:
        return float(np.mean([np.abs(a - b).sum(1).mean() for a, b in zip(shares, shares[apart:], strict=False)]))

    return between(1), between(2)


def test_tasks_are_as_far_apart_as_on_real_traces() -> None:
    other, same = distances(5.0, turns=True)
    assert 0.8 < other < 1.1 and 0.11 < same < 0.25  # 0.88, and 0.11 and 0.25, on DeepSeek-V2-Lite's
    assert distances(5.0, turns=False)[0] < 0.25


@given(experts=st.sampled_from([8, 16, 64]), top_k=st.integers(1, 4), skew=st.floats(1.5, 1.9), seed=st.integers(0, 99))
def test_made_routing_is_as_skewed_as_asked(experts: int, top_k: int, skew: float, seed: int) -> None:
    routing = topic_routing(experts, top_k, 2, skew, seed=seed)
    assert routing.skew == pytest.approx(skew, rel=NEAR)
    ids = routing.pool_ZPLK
    assert ids.min() >= 0 and ids.max() < experts
    in_order = np.sort(ids, axis=3)
    assert (in_order[..., 1:] > in_order[..., :-1]).all()  # no expert twice
    profile = routing.profile(tokens=64, seed=0)
    assert (profile.num_tokens, profile.top_k, profile.num_layers) == (64, top_k, 2)


def test_skews_that_are_not_there_are_refused() -> None:
    for skew in (1.0, 4.0):
        with pytest.raises(ValueError, match=f"skew {skew:g}: with 8 experts and top-2 it is above 1 and below 4"):
            topic_routing(8, 2, 2, skew)
    with pytest.raises(ValueError, match="skew 60 is not reached with 64 experts and top-1"):
        topic_routing(64, 1, 2, 60.0)
    with pytest.raises(ValueError, match="chance alone gives 1.35"):
        topic_routing(64, 1, 2, 1.01)


# placements without replication


def test_residents_hold_each_expert_as_often_as_there_are_devices_for_it() -> None:
    assert resident(6, 3, 3).slots == ((0, 1, EMPTY), (2, 3, EMPTY), (4, 5, EMPTY))
    assert resident(5, 3, 2).slots == ((0, 1), (2, 3), (4, EMPTY))
    assert resident(2, 4, 1).slots == ((0,), (1,), (0,), (1,))


# a point


def hardware(*, plan_s: float = 0.0, expert_s: float = 0.0) -> Hardware:
    model = ModelConfig(num_layers=20, d_model=2048, num_heads=16, num_kv_heads=16, num_experts=16, d_ff=8192)
    train = TrainConfig(dtype="bfloat16", seq_len=256)
    cluster = compose(["cluster=h100_400g"]).cluster
    config = PretrainConfig(model=model, router=RouterConfig(top_k=2), cluster=cluster, train=train)
    return Hardware(config=config, context=0, expert_s=expert_s, planner=PlannerSeconds(plan_s=plan_s, check_s=plan_s / 10))


@pytest.fixture(scope="module")
def modes() -> Modes:
    return Modes(LOAD, MODES)


@pytest.mark.full
def test_where_deciding_and_fetching_are_free_a_better_foresight_is_faster(modes: Modes) -> None:
    times = mode_times(modes, hardware())
    assert list(times) == [STATIC, "profile", "window", "lina", "best", ORACLE, IDEAL]
    loads = {name: time.max_over_mean for name, time in times.items()}
    assert loads[IDEAL] == 1 <= loads[ORACLE] <= loads["best"] < loads["profile"] < loads[STATIC]
    assert times["best"].seconds < times["profile"].seconds < times[STATIC].seconds
    assert loads["window"] > 1.5  # it foresees the other task
    assert times["profile"].fetched == times[STATIC].fetched == 0 < times["best"].fetched
    assert times["best"].seconds > (20 - LAYERS) * times["best"].layer_s  # all layers of the model


@pytest.mark.full
def test_a_slow_plan_and_a_slow_fetch_cost_those_who_swap_and_nobody_else(modes: Modes) -> None:
    free, slow = mode_times(modes, hardware()), mode_times(modes, hardware(plan_s=0.02))
    fetched = mode_times(modes, hardware(expert_s=0.02))
    for name in (STATIC, "profile", IDEAL):
        assert free[name] == slow[name] == fetched[name]
    for name in ("window", "lina", "best", ORACLE):
        assert slow[name].layer_s > free[name].layer_s + 0.015
        assert fetched[name].layer_s > free[name].layer_s + 0.015
    assert verdict(fetched).mode == "profile" and "wait fetch" in fetched["best"].waits_s


@pytest.mark.full
def test_one_task_for_long_is_what_a_window_foresees() -> None:
    times = mode_times(Modes(replace(LOAD, turns=False), MODES), hardware())
    assert times["window"].max_over_mean < 1.3


def test_decisions_are_shared_by_clusters_but_where_a_trigger_weighs_times(modes: Modes) -> None:
    assert modes.decided("window", 1.0, 1.0)[1] is modes.decided("window", 2.0, 1.0)[1]
    assert modes.decided("best", 1.0, 1.0)[1] is not modes.decided("best", 2.0, 1.0)[1]


def test_more_devices_than_experts_are_groups_of_devices() -> None:
    load = replace(LOAD, num_experts=4, num_devices=8, slots=2, skew=1.5)
    times = mode_times(Modes(load, {"profile": PROFILE}), hardware())
    assert times[IDEAL].max_over_mean == pytest.approx(1.0, abs=0.02)
    assert times["profile"].max_over_mean < times[STATIC].max_over_mean


# verdicts, tables, the figure


def times_of(**seconds: float) -> dict[str, ModeTime]:
    return {name: ModeTime(s, s / 10, 1.0, 0.5, {}) for name, s in seconds.items()}


FOUND = times_of(static=2.0, profile=1.6, best=1.0, even=1.01, oracle=0.9, ideal=0.8)


def test_a_verdict_names_the_fastest_mode_that_can_be_had() -> None:
    found = verdict(FOUND)
    assert (found.gain, found.mode, found.as_good, found.most, found.pays) == (2.0, "best", ("best", "even"), 2.5, True)
    poor = verdict(times_of(static=1.0, profile=0.98, best=3.0, oracle=0.5, ideal=0.5))
    assert (poor.pays, poor.mode, poor.most) == (False, "profile", 2.0)


@pytest.mark.parametrize(
    ("gain", "most", "text"), [(1.84, 2.0, "1.8 B"), (1.05, 1.1, "1.1 B"), (1.04, 1.26, "(1.3)"), (0.4, 1.04, ".")]
)
def test_a_cell_says_gain_and_mode_or_what_was_wanted(gain: float, most: float, text: str) -> None:
    assert text_of(Verdict(gain, "best", ("best",), most)) == text


def point(**changes: object) -> Point:
    place = {"title": "Tiny", "phase": "prefill", "devices": 8, "skew": 2.0, "turns": True, "cluster": "h100", "slots": 3}
    one = Point(**place, expert_s=0.02, plan_s=0.0, times=FOUND)  # type: ignore[arg-type]
    return replace(one, **changes)  # type: ignore[arg-type]


def test_tables_hold_what_was_found() -> None:
    points = [point(), point(skew=1.5, times=times_of(static=1.0, profile=1.0, best=2.0, even=2.0, oracle=1.0, ideal=1.0))]
    assert map_table("h100", [p.cell for p in points]).splitlines() == [
        "| h100 | 8 devices, skew 1.5 | 8 devices, skew 2 |",
        "| --- | --- | --- |",
        "| Tiny, prefill | . | 2.0 B |",
    ]
    lines = modes_table("Turns", points).splitlines()
    assert lines[0].startswith("| Turns: something to gain at 1 of 2 points, replication pays at 1 |")
    assert lines[2:] == [
        "| profile | 1 | 0 | 0 | 1.12 |",
        "| best | 1 | 1 | 1 | 1.25 |",
        "| even | 1 | 1 | 1 | 1.24 |",
        "| oracle | 1 |  | 0 | 1.61 |",
    ]
    assert (
        swap_table(points[:1]).splitlines()[2]
        == "| h100 | Tiny, prefill | 8 | 80.00 | 20.00 | 4.0 | 3 | 0.5 | 1.25 | 2.00 | 2.50 |"
    )
    plans = [point(), point(plan_s=0.0062, times=times_of(static=2.0, best=4.0))]
    assert plan_table(plans, ["best"]).splitlines()[2] == "| h100 | Tiny, prefill | 2.00 | 0.50 |"
    assert slots_table(points[:1]).splitlines()[2] == "| h100 | Tiny, prefill | 3 | 1.25 | 2.00 | 2.22 | 2.50 |"
    told = point().as_json()
    assert told["verdict"]["pays"] and told["times"]["best"]["seconds"] == 1.0


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    cells = [Cell("a", 8, 2.0, verdict(FOUND)), Cell("b", 32, 1.5, Verdict(1.0, "best", (), 2.0))]
    draw(tmp_path / "map.svg", {"one": cells, "two": cells[:1]}, ["a note"])
    text = (tmp_path / "map.svg").read_text()
    assert "<!-- 2.0 B -->" in text and "<!-- (2.0) -->" in text and "<!-- a note -->" in text and "<!-- two -->" in text
    assert columns_of(cells) == [(8, 2.0), (32, 1.5)]


# against what was measured


def test_a_replay_takes_the_emulated_times_and_the_host_besides() -> None:
    """All tokens go to the same expert: one of 8 devices has 8 times an even share."""
    batches = [np.zeros((512, 3, 1), int)] * 4
    profile = traced(np.random.default_rng(0).integers(0, 16, (600, 3, 1)), 16)
    static, ideal = (
        replayed(batches, profile, read_mode(CONF, mode), num_devices=8, host_s=0.005) for mode in ("static", "ideal")
    )
    assert ideal.p50_ms == ideal.p95_ms == pytest.approx(3e3 * (0.005 + ATTENTION_S + 1.02 * EXPERTS_S))
    assert static.p50_ms == pytest.approx(3e3 * (0.005 + ATTENTION_S + 8.02 * EXPERTS_S))
    assert (static.load_p95, ideal.load_p95, static.fetched) == (8.0, 1.0, 0.0)
    best = replayed(batches, profile, read_mode(CONF, "best"), num_devices=8, host_s=0.005)
    assert best.p50_ms < 0.5 * static.p50_ms and best.fetched > 0


def test_the_host_is_what_is_left_and_errors_are_counted_without_the_fitted_one() -> None:
    assert fitted_host_s(Replayed(686.0, 700.0, 0.0, 1.0), Measured(846.0, 862.0, 0.0), 26) == pytest.approx(0.16 / 26)
    assert fitted_host_s(Replayed(900.0, 900.0, 0.0, 1.0), Measured(846.0, 862.0, 0.0), 26) == 0.0
    real = MEASURED[16, "paper"]
    exact = {mode: Replayed(m.p50_ms, m.p95_ms * 1.1, m.fetched, 1.0) for mode, m in real.items()}
    lines = table({(16, "paper"): exact}, 0.006).splitlines()
    assert lines[4].startswith("| 16, paper | static | 1787 / 1787 | +0.0% | 2082 / 2290 | +10.0% | 1.00 / 1.00 | 1.00 / 1.00 |")
    assert lines[-1] == "9 times, without the fitted one: off by 10.0% (median), 10.0% (worst)."
    assert math.isclose(sum(m.p50_ms for m in real.values()), 1787 + 1245 + 1076 + 883 + 846)
