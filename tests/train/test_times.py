"""Times of instructions: medians of what whole micro-batches would take, the slowest rank's, the same on all."""

from pathlib import Path

import pytest

from megalina.config import StrategyConfig
from megalina.mesh import build_mesh
from megalina.step.plan import Plan
from megalina.step.program import Kind, Op, shares_of
from megalina.step.strategy import training_step
from megalina.timeline.instruction_times import times_of
from megalina.timeline.recorder import COMPUTE, SEND, Event
from megalina.train.times import STEPS, WATCH, Times, described, drifted
from tests.parallel.ranks import run_on_ranks
from tests.step.test_place_weights import SHAPES, setting_of
from tests.train.small_run import config_of, records_of, write_tokens

PLAN = Plan("lancet", deferred_weights="all", chunks=(2,))
PROGRAM = training_step("lancet", setting_of(SHAPES["moe"], PLAN, 2))


def events(factor: float = 1.0) -> list[Event]:
    """A millisecond of each instruction that computes, two of each exchange of tokens."""
    out = []
    for s in PROGRAM:
        sends = s.kind is Kind.START and s.op is Op.TOKENS
        if sends or s.kind is Kind.COMPUTE:
            kind, ms = (SEND, 2.0) if sends else (COMPUTE, 1.0)
            out.append(Event(kind, s.tag, s.phase, s.name, s.layer, s.part, "", s.axis, 0, 0.0, 0.0, factor * ms / 1e3))
    return out


def test_times_are_of_whole_micro_batches() -> None:
    found = times_of(events(), shares_of(PROGRAM))
    assert found["B:attention"] == pytest.approx(1000) and found["W:attention"] == pytest.approx(1000)
    assert found["W:experts"] == pytest.approx(2000) and found["B:combine>"] == pytest.approx(4000)  # chunks are halves
    assert not any(kind.startswith("U:") for kind in found)


def test_they_are_measured_over_some_steps_and_again_when_they_drift() -> None:
    plans = [PLAN]
    times = Times(build_mesh(), plans.append, lambda: PROGRAM)
    assert not times.decided(PLAN) and times.decided(Plan("flow"))
    for step in range(1, 3 * (WATCH + STEPS)):
        before = len(plans)
        times.after(step, lambda slow=1 + (step > WATCH): events(slow), plans[-1])  # type: ignore[misc]
        if len(plans) > before:
            assert plans[-1].measured_at == step and times.decided(plans[-1])
    assert [dict(plan.times_us)["W:experts"] for plan in plans[1:]] == [2000, 4000]
    assert Plan.from_json(plans[-1].as_json()) == plans[-1]
    assert described({"W:experts": 1500.0, "B:join": 3.0}) == "W:experts 1.50 ms"
    assert not drifted({"a": 100.0, "b": 1.0}, {"a": 100.0, "b": 3.0}) and drifted({}, {"a": 1.0})


def slowest(rank_ms: tuple[float, ...]) -> dict[str, float]:
    plans = [PLAN]
    mesh = build_mesh()
    times = Times(mesh, plans.append, lambda: PROGRAM)
    for step in range(1, 3 + STEPS):
        times.after(step, lambda: events(rank_ms[mesh.world.rank]), plans[-1])
    return dict(plans[-1].times_us)


def test_the_slowest_rank_counts() -> None:
    found = run_on_ranks(2, slowest, (1.0, 3.0))
    assert found[0] == found[1] and found[0]["W:experts"] == pytest.approx(6000)


def both(folder: Path) -> dict[str, list[float]]:
    """Losses and norms of a run under eager and under lancet."""
    out = {}
    for strategy in (StrategyConfig(), StrategyConfig(name="lancet", deferred_weights="all")):
        config = config_of(folder, strategy.name, ep=2, steps=8, dtype="float64", tie_embeddings=False)
        config.strategy = strategy
        recorder = records_of(config)
        out[strategy.name] = recorder.of("loss") + recorder.of("grad_norm")
        out[f"plans of {strategy.name}"] = [r.get("plan", "") for r in recorder.records]
    return out


@pytest.mark.full
def test_a_run_follows_times_and_no_bit_of_a_loss_changes(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    ranks = run_on_ranks(2, both, tmp_path)
    for rank in ranks:
        assert rank["eager"] == rank["lancet"]
    plans = ranks[0]["plans of lancet"]
    assert plans == ranks[1]["plans of lancet"]
    assert all("times" not in plan for plan in plans[: 2 + STEPS]) and "times" in plans[-1]
