"""Interleaved runs on two ranks: turns in turn, every strategy on the same data, numbers that all ranks agree on."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalina.compare.interleaved import (
    HOPEFUL,
    WORTHWHILE,
    Competitor,
    _without_hopeless,
    alone,
    layout_of,
    run_interleaved,
)
from megalina.compare.results import VALID_OVERRUN, as_json, by_round, measure
from megalina.config import ClusterConfig, StrategyConfig
from megalina.data.source import open_data
from megalina.mesh import build_mesh
from megalina.timeline.recorder import COMPUTE, SEND
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import config_of, write_tokens

ROUNDS, TURN, WARM_UP = 2, 2, 1
STRATEGIES = {
    "eager whole": StrategyConfig(),
    "eager 4 KiB": StrategyConfig(partition_bytes="4096"),
    "ddp": StrategyConfig(name="ddp", bucket_mb=1.0),
    "flow": StrategyConfig(name="flow", parts=2, yields=True, partition_bytes="4096"),
    "windows": StrategyConfig(name="lina", chunks="2", windows="auto"),
}
DEVICE = ClusterConfig(attention_ms=6.0, experts_ms=8.0)
SLOW_DEVICE = ClusterConfig(attention_ms=60.0, experts_ms=80.0)


def work(folder: Path) -> dict[str, Any]:
    config = config_of(folder, "run", ep=2, micro_batch_size=4, dtype="float64")
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    turns: list[tuple[int, int, str]] = []
    competitors = run_interleaved(
        {name: replace(config, strategy=strategy) for name, strategy in STRATEGIES.items()},
        data,
        rounds=ROUNDS,
        turn=TURN,
        progress=lambda done, total, name: turns.append((done, total, name)),
    )
    known = alone(competitors)
    found = measure(competitors, known, turn=TURN, ranks_per_node=1, link_mbit=100.0)
    one = {"eager": replace(config, cluster=DEVICE, strategy=StrategyConfig())}
    (slow,) = paced = run_interleaved(one, data, rounds=1, turn=2)
    (emulated,) = measure(paced, {}, turn=2, ranks_per_node=2, link_mbit=0.0).values()
    return {
        "turns": turns,
        "found": found,
        "losses": {c.name: c.losses for c in competitors},
        "own step_s": {c.name: c.step_s for c in competitors},
        "events": {c.name: [len({e.tag for e in events}) for events in c.events] for c in competitors},
        "kinds": {e.kind for c in competitors for events in c.events for e in events},
        "searched": {c.name: c.search_steps for c in competitors},
        "calibrated": {op: line.seconds(10**6) for op, line in known[layout_of(competitors[0].runner.mesh)].items()},
        "emulated": emulated,
        "device step_s": sum(slow.busy_s) / len(slow.step_s),
    }


def run_heats(folder: Path) -> dict[str, tuple[list[float], int]]:
    config = config_of(folder, "run", ep=2, micro_batch_size=4, dtype="float64")
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    slow_device = replace(config, cluster=SLOW_DEVICE)
    runners = {f"eager {n}": config for n in "abc"} | dict.fromkeys(("slow", "ddp"), slow_device)
    heats = run_interleaved(runners, data, rounds=3, turn=1, baseline="eager", to_the_end=["ddp"])
    return {c.name: (c.step_s, len(c.losses)) for c in heats}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("contest")
    write_tokens(folder / "tokens")
    return run_on_ranks(2, work, folder)


@pytest.mark.full
def test_turns_rotate_and_each_strategy_has_one_in_each_round(ranks: list[dict[str, Any]]) -> None:
    names = list(STRATEGIES)
    assert ranks[0]["turns"] == ranks[1]["turns"]
    done, total, order = zip(*ranks[0]["turns"], strict=True)
    assert list(done) == list(range(len(order))) and set(total) == {len(order)} == {len(names) * (ROUNDS + 1)}
    for number in range(ROUNDS + 1):
        at = number % len(names)
        assert list(order[number * len(names) : (number + 1) * len(names)]) == names[at:] + names[:at]


@pytest.mark.full
def test_timed_steps_are_those_after_the_first_of_a_turn(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in STRATEGIES:
            assert len(rank["own step_s"][name]) == len(rank["events"][name]) == ROUNDS * TURN
            assert len(rank["losses"][name]) == WARM_UP + rank["searched"][name] + ROUNDS * (TURN + 1)
            assert len(set(rank["events"][name])) == 1 and rank["events"][name][0] > 20  # each step recorded, whole
        assert {COMPUTE, SEND} < rank["kinds"]


@pytest.mark.parametrize(
    ("step_s", "going_on"),
    [
        (
            {"eager a": 1.0, "eager b": 1.02, "eager c": 1.04, "ddp": 9.0, "lina": 1.04, "flow": 1.06},
            "eager a, eager b, ddp, lina",
        ),
        ({"eager a": 2.0, "eager b": 1.0, "lina": 1.5}, "eager b"),
        ({"eager a": 1.0, "eager_plain": 0.5, "lina": 1.04}, "eager a, eager_plain, lina"),  # no variant: nobody is held to it
        ({"lina": 2.0, "flow": 1.0}, "lina, flow"),  # nobody to hold them against
    ],
)
def test_who_is_clearly_slower_than_the_best_baseline_is_hopeless(step_s: dict[str, float], going_on: str) -> None:
    alone: Any = SimpleNamespace(mesh=build_mesh())
    competitors = [Competitor(name, alone, step_s=[9.0, s, s]) for name, s in step_s.items()]
    assert ", ".join(c.name for c in _without_hopeless(competitors, "eager", ["ddp"])) == going_on


@pytest.mark.full
def test_what_is_slow_in_the_first_round_takes_no_further_turn(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    heats = run_on_ranks(2, run_heats, tmp_path)
    first_s = {name: max(rank[name][0][0] for rank in heats) for name in heats[0]}
    best_s = min(s for name, s in first_s.items() if name.startswith("eager "))
    limit_s = {name: best_s * (HOPEFUL if name.startswith("eager ") else WORTHWHILE) for name in first_s}
    for rank in heats:
        turns = {name: len(step_s) for name, (step_s, _) in rank.items()}
        assert turns == {name: 3 if first_s[name] <= limit_s[name] or name == "ddp" else 1 for name in rank}
        assert turns["slow"] == 1 < turns["ddp"] == 3
        assert all(steps == WARM_UP + 2 * turns[name] for name, (_, steps) in rank.items())


@pytest.mark.full
def test_all_have_eagers_losses_on_the_same_data(ranks: list[dict[str, Any]]) -> None:
    base = ranks[0]["losses"]["eager whole"]
    assert len(set(base)) == len(base)  # it learns
    for rank in ranks:
        for name, losses in rank["losses"].items():
            together = min(len(base), len(losses))
            assert losses[:together] == pytest.approx(base[:together], rel=1e-10), name
            assert rank["found"][name].largest_loss_difference < 1e-10


@pytest.mark.full
def test_numbers_are_of_the_slowest_rank_and_agreed_on(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["found"] == ranks[1]["found"]
    found = ranks[0]["found"]
    for name, m in found.items():
        assert m.step_s == [max(pair) for pair in zip(*(rank["own step_s"][name] for rank in ranks), strict=True)]
    base = min(("eager whole", "eager 4 KiB"), key=lambda name: found[name].median_step_s)
    assert found[base].ratio_to_eager == 1.0
    for m in found.values():
        assert m.ratio_to_eager == found[base].median_step_s / m.median_step_s
        assert m.ratio_to_ddp == found["ddp"].median_step_s / m.median_step_s
        ratios = by_round(found[base].step_s, m.step_s, TURN)
        assert min(ratios) <= m.ratio_spread[0] <= m.ratio_spread[1] <= max(ratios)
        assert 0 < m.a2a_exposed_s < m.median_step_s * 2 and m.link_s > 0 and m.compute_s > 0
        assert m.device_s == m.overrun_fraction == 0  # no device is emulated
    assert len({m.link_s for name, m in found.items() if "eager" in name}) == 1  # pieces have the same bytes
    assert as_json("1x2", found)["lower_bound_s"] == min(m.link_s for m in found.values())


@pytest.mark.full
def test_windows_are_measured_before_the_first_round(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["searched"]["windows"] > 0 == rank["searched"]["flow"]
        assert "windows" in rank["found"]["windows"].plan


@pytest.mark.full
def test_exchanges_are_calibrated(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["calibrated"] == ranks[1]["calibrated"]
    assert ranks[0]["calibrated"].keys() >= {"tokens", "grads"} and min(ranks[0]["calibrated"].values()) > 0


@pytest.mark.full
def test_an_emulated_device_is_busy_for_what_its_list_costs(ranks: list[dict[str, Any]]) -> None:
    """Two layers, forward once and backward twice, and small instructions for the rest."""
    for rank in ranks:
        emulated = rank["emulated"]
        assert emulated.device_s == pytest.approx(rank["device step_s"])
        assert 2 * 3 * (6e-3 + 8e-3) < emulated.device_s < emulated.median_step_s
        assert emulated.critical_path_s > 0 == emulated.link_s  # one node
        setting = as_json("1x2", {"eager": emulated})
        assert setting["lower_bound_s"] == emulated.device_s
        assert setting["valid"] == (emulated.overrun_fraction <= VALID_OVERRUN)
