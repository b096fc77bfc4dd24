"""Windows: what fits into the gaps that tokens leave, as measured, the least over ranks, and measured again when it drifts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalina.blocks.model import plain_shape
from megalina.config import PretrainConfig, StrategyConfig
from megalina.mesh import build_mesh
from megalina.step.forward import plain
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Kind, Op
from megalina.step.strategy import Setting, training_step
from megalina.timeline.recorder import SEND, Event
from megalina.train.windows import DRIFT, STEPS, WATCH, Windows, bytes_per_s, described, drifted, gap_seconds
from megalina.validate import check_config
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import config_of, records_of, write_tokens

RATE = 1e6  # bytes a second


def sent(name: str, op: str, start_s: float, end_s: float, *, phase: str = "B", num_bytes: int = 0) -> Event:
    return Event(SEND, f"{phase}:{name}", phase, name, 0, "0", op, "ep", num_bytes, start_s, start_s, end_s)


def backward(experts_s: float, attention_s: float, layers: int = 3) -> list[Event]:
    """Exchanges of 10 ms, with those gaps between them, and a piece of gradients alone and one beside tokens in each layer."""
    events, now_s = [sent("dispatch", "tokens", 0.0, 0.5, phase="F")], 1.0
    for _ in range(layers):
        for name, gap_s in (("combine", experts_s), ("dispatch", attention_s)):
            events += [
                sent(name, "tokens", now_s, now_s + 0.01),
                sent("dense", "grads", now_s, now_s + 0.01, num_bytes=int(0.001 * RATE)),
                sent("dense", "grads", now_s + 0.01, now_s + 0.01 + gap_s / 2, num_bytes=int(gap_s / 2 * RATE)),
            ]
            now_s += 0.01 + gap_s
    return events


def test_gaps_are_between_the_exchanges_of_backward() -> None:
    assert gap_seconds(backward(0.03, 0.02)) == pytest.approx({"experts": 0.03, "attention": 0.02})
    assert gap_seconds([]) == {"experts": 0.0, "attention": 0.0}
    overlapping = [sent("combine", "tokens", 0.0, 0.02), sent("dispatch", "tokens", 0.01, 0.03)]
    assert gap_seconds(overlapping) == {"experts": 0.0, "attention": 0.0}


def test_gaps_are_those_of_the_last_micro_batchs_backward() -> None:
    """In the others another micro-batch's tokens may be on the wire, and no gradients."""
    paired = [sent("combine", "tokens", 0.0, 0.1), sent("dispatch", "tokens", 0.1, 0.3, phase="F")]
    paired += [sent("dispatch", "tokens", 0.5, 0.6), sent("combine", "tokens", 0.6, 0.7, phase="F")]
    later = [replace(e, start_s=e.start_s + 1, end_s=e.end_s + 1) for e in backward(0.03, 0.02) if e.phase == "B"]
    assert gap_seconds([*paired, *later]) == pytest.approx({"experts": 0.03, "attention": 0.02})


def test_the_rate_is_that_of_gradients_that_met_no_tokens() -> None:
    assert bytes_per_s(backward(0.03, 0.02)) == pytest.approx(RATE, rel=0.01)
    assert bytes_per_s([sent("combine", "tokens", 0.0, 1.0), sent("dense", "grads", 0.5, 0.6, num_bytes=100)]) == 0.0


def test_small_changes_are_no_drift() -> None:
    now = {"experts": 100_000, "attention": 0}
    assert drifted({}, now) and not drifted(now, now)
    assert not drifted(now, {"experts": 100_000 - int(100_000 * DRIFT * 0.9), "attention": 0})
    assert drifted(now, {"experts": 60_000, "attention": 0}) and drifted(now, {"experts": 100_000, "attention": 5_000})


def test_windows_are_measured_over_some_steps_and_again_when_they_drift() -> None:
    plans: list[Plan] = [Plan("priority", yields=True)]
    windows = Windows(build_mesh(), plans.append)
    for step in range(1, 3 * (WATCH + STEPS)):
        before = len(plans)
        gap_s = 0.03 if step < WATCH else 0.01
        assert windows.measuring(plans[-1]) or step < 3 or len(plans) > 1
        windows.after(step, lambda gap_s=gap_s: backward(gap_s, 0.02), plans[-1])  # type: ignore[misc]
        if len(plans) > before:
            assert plans[-1].measured_at == step
    found = [dict(plan.gap_bytes) for plan in plans[1:]]
    assert found == [
        pytest.approx({"experts": 0.03 * RATE, "attention": 0.02 * RATE}, rel=0.01),
        pytest.approx({"experts": 0.01 * RATE, "attention": 0.02 * RATE}, rel=0.01),
    ]
    assert [plan.measured_at for plan in plans[1:]] == [2 + STEPS, 2 + 2 * STEPS + WATCH]
    assert "MiB between the two all-to-alls of a layer" in described({"experts": 2**20, "attention": 0})


def windowed(folder: Path) -> dict[str, Any]:
    """A run of priority with and without windows."""
    out: dict[str, Any] = {}
    for name in ("none", "auto"):
        config = config_of(folder, name, ep=2, steps=8, dtype="float64")
        config.strategy = StrategyConfig(name="priority_partition", yields=True, partition_bytes="4096", windows=name)
        recorder = records_of(config)
        out[name] = recorder.of("loss"), [r.get("plan") for r in recorder.records]
    return out


@pytest.mark.full
def test_a_run_follows_windows_and_its_losses_are_the_same(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    ranks = run_on_ranks(2, windowed, tmp_path)
    for rank in ranks:
        assert rank["auto"][0] == pytest.approx(rank["none"][0], rel=1e-12)
        assert rank["none"][1] == [None] * 8
    plans = ranks[0]["auto"][1]
    assert all("windows" not in plan for plan in plans[: 2 + STEPS]) and "windows" in plans[-1]
    assert plans == ranks[1]["auto"][1]


def test_gaps_get_what_fits_and_the_tail_the_rest() -> None:
    shape = plain_shape(moe=(True, True, True))
    buckets = {name: BucketSpec(64, "dp", piece=16) for name in dict.fromkeys(u for s in plain(shape) for u in s.uses)}
    program = training_step("priority", Setting(shape, buckets, Plan(gap_bytes=(("experts", 80), ("attention", 0)))))
    starts = [i for i, s in enumerate(program) if s.op is Op.GRADS and s.kind is Kind.START]
    gaps = [i for i, s in enumerate(program) if s.phase == "B" and s.kind is Kind.WAIT and s.name == "combine"]
    last = max(i for i, s in enumerate(program) if s.phase == "B" and s.kind is Kind.COMPUTE)
    in_gaps = [sum(gap < start < after for start in starts) for gap, after in zip(gaps, [*gaps[1:], last], strict=True)]
    assert in_gaps == [0, 2, 2]  # pieces of 16 until 20 elements are exceeded; at first there are no gradients yet
    assert sum(start > last for start in starts) == len(starts) - 4


@pytest.mark.parametrize("name", ["eager", "ddp", "serial", "fixed", "lina_zero", "auto"])
def test_strategies_without_gaps_refuse_windows(name: str) -> None:
    config = PretrainConfig(strategy=StrategyConfig(name=name, windows="auto"))
    with pytest.raises(ValueError, match=f"strategy.windows=auto works with .* not with {name}: set strategy.windows=none"):
        check_config(config, 1)
