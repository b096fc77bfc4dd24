"""Newton-Schulz on the emulated wire: the tail of a step with directions at the end and under the tokens' all-to-alls.

Nodes, links and devices are emulated (docs/cluster.md), in slow motion so that real math fits under the devices' time; trainer,
math and losses are real.  Directions take the device's time for their FLOPs.  All lists take turns in one job; what virtual time
says of the same lists stands beside.  Gradients are not clipped: where they are, directions that came early are made again.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megalina.compare.ladder import Setting
    from megalina.config import PretrainConfig

BASE = "eager, AdamW"  # names that begin with eager are what ratios are to
SLOW_MOTION = 3.0
AFTERS = (1, 2, 4)  # all-to-alls
VARIANTS: Mapping[str, tuple[str, ...]] = {
    BASE: ("optim=adamw",),
    "Muon, at the end": ("optim=muon",),
    **{f"Muon, after {n} all-to-all{'s' * (n > 1)}": ("optim=muon", f"strategy.newton_schulz_after={n}") for n in AFTERS},
}


@dataclass(frozen=True, slots=True)
class OnTheWire:
    """One list, measured; times are medians over steps, of the slowest rank, in the cluster's own time."""

    name: str
    zero: int
    step_ms: float
    step_quartiles_ms: tuple[float, float]
    tail_ms: float
    tail_quartiles_ms: tuple[float, float]
    virtual_step_ms: float
    virtual_tail_ms: float
    newton_schulz_ms: float  # of the device, in a step
    overrun: float  # share of the devices' time by which real math was late


def variants() -> dict[str, tuple[str, ...]]:
    """Overrides by name, without and with ZeRO-1."""
    of_zero = {0: "", 1: ", ZeRO-1"}
    return {
        name + of_zero[zero]: ("strategy=eager", f"parallel.zero={zero}", "optim.clip_norm=0", *words)
        for zero in of_zero
        for name, words in VARIANTS.items()
    }


def setting_of(only: str, slow_motion: float) -> "Setting":
    """ValueError for a setting that the ladder doesn't have."""
    from dataclasses import replace

    from megalina.compare.ladder import LADDER

    by_name = {setting.name: setting for setting in LADDER}
    if only not in by_name:
        raise ValueError(f"--only {only}: the ladder has {', '.join(by_name)}")
    return replace(by_name[only], slow_motion=slow_motion)


def measure(setting: "Setting", *, rounds: int, steps: int, overrides: Sequence[str] = ()) -> list[OnTheWire]:
    """All lists in turns.  `steps`: timed ones of a turn; `overrides` come last.  ValueError for what can't be run."""
    from megalina.cli.compare import job_of, run
    from megalina.compare.ladder import LINK_MBIT
    from megalina.namespaces import check_host

    if setting.nodes > 1:
        check_host()
    named = variants()
    job = job_of(setting, tuple(named), variants=named, base=setting.all_overrides(), link_mbit=LINK_MBIT, overrides=overrides)
    args = argparse.Namespace(rounds=rounds, steps=steps, picture=None, trace=None)
    with tempfile.TemporaryDirectory(prefix="megalina_wire_") as folder:
        found = run(job, args, Path(folder), first=False, to_the_end=tuple(named))
    out = []
    for name, config in job.configs.items():
        measured = found["strategies"][name]
        step_s, tail_s, directions_s = in_virtual_time(config, setting.world, job.link_mbit)
        own = [s * 1e3 / setting.slow_motion for s in (step_s, tail_s, directions_s)]
        times = (*_with_quartiles(measured["step_s"]), *_with_quartiles(measured["tail_s"]))
        title = name.removeprefix("eager, ").removesuffix(", ZeRO-1")
        out.append(OnTheWire(title, config.parallel.zero, *times, *own, measured["overrun_fraction"]))
    return out


def in_virtual_time(config: "PretrainConfig", world: int, link_mbit: float) -> tuple[float, float, float]:
    """Seconds of a step, of its tail, and of a rank's directions; links that share fairly, and hosts that take no time."""
    from megalina.compare.results import tail_of
    from megalina.perfmodel.cost.instruction_seconds import emulated_seconds
    from megalina.perfmodel.forecast.priced_step import PricedStep
    from megalina.perfmodel.sim.network import one_level
    from megalina.plan_settings import plan_of
    from megalina.step.program import Kind

    rate = link_mbit * 1e6 / 8 or float("inf")
    vocab_size = config.model.vocab_size or config.data.vocab_size
    step = PricedStep(config, world, plan_of(config.strategy), vocab_size=vocab_size, network=one_level(rate, 0.0))
    seconds = emulated_seconds(config, step.held.buckets)
    if seconds is None:
        raise ValueError("no device is emulated: give cluster.attention_ms and cluster.experts_ms, or cluster.device_gflops")
    timeline = step.walk(program=step.program, seconds=lambda s: seconds(s) if s.kind is Kind.COMPUTE else 0.0)
    directions_s = sum(seconds(s) for s in step.program if s.name.startswith("newton_schulz ") and s.kind is Kind.COMPUTE)
    return timeline.step_s, tail_of(timeline.events(0)), directions_s


def _with_quartiles(times_s: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles, in milliseconds."""
    from megalina.timeline.contention import quantile

    low, high = (quantile(times_s, q) or 0.0 for q in (0.25, 0.75))
    return statistics.median(times_s) * 1e3, (low * 1e3, high * 1e3)


def table(found: Sequence[OnTheWire]) -> str:
    """In Markdown."""
    if not found:
        return ""
    lines = [
        "| list | ZeRO | step, ms | its quartiles | tail, ms | its quartiles | virtual step | virtual tail | Newton-Schulz, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in found:
        (step_low, step_high), (tail_low, tail_high) = m.step_quartiles_ms, m.tail_quartiles_ms
        lines.append(
            f"| {m.name} | {m.zero} | {m.step_ms:.0f} | {step_low:.0f} - {step_high:.0f} | {m.tail_ms:.0f} | "
            f"{tail_low:.0f} - {tail_high:.0f} | {m.virtual_step_ms:.0f} | {m.virtual_tail_ms:.0f} | {m.newton_schulz_ms:.0f} |"
        )
    return "\n".join([*lines, "", f"real math late by at most {max(m.overrun for m in found):.1%} of the devices' time"])
