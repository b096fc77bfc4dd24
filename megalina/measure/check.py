"""A forecast held against steps of a short run of the real trainer: the error, and what it is made of."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch

from megalina.config import PretrainConfig
from megalina.data.source import open_data
from megalina.mesh import all_gather_object
from megalina.perfmodel.forecast.forecast import forecast
from megalina.timeline.contention import class_of
from megalina.timeline.recorder import COMPUTE, WAIT, Event, Recorder
from megalina.train.step_runner import StepRunner

WARM_UP = 3  # steps: allocators, caches, pages of the optimizer's state
BETWEEN = "between instructions"  # all that is in no instruction and no wait
WAITS = "waits for"
SHOWN = 6  # parts of a step
HEAD = f"{'predicted':>12}{'measured':>12}{'error':>9}"
LEAST_CORE_SHARE = 0.9


def trial_run(config: PretrainConfig, device: torch.device, *, steps: int) -> dict[str, Any]:
    """Medians over steps, the same on every rank: {step_s: of the slowest rank, computed_s: CPU time of a rank's thread (on CUDA
    null), core_share: that over the time in which instructions computed (on CUDA null), parts: seconds by what they went to}.

    All ranks call it together."""
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    runner = StepRunner(config, data, device=device)
    took_s: list[float] = []
    cpu_s: list[float] = []
    parts: list[dict[str, float]] = []
    for number in range(1, WARM_UP + steps + 1):
        all_gather_object(runner.mesh, None)
        recorder = Recorder() if number > WARM_UP else None
        started_s, cpu_started_s = time.perf_counter(), time.thread_time()
        runner.compute(number, record=recorder)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if recorder is not None:
            took_s.append(time.perf_counter() - started_s)
            cpu_s.append(time.thread_time() - cpu_started_s)
            events = recorder.events()
            parts.append(whole(parts_of(events), took_s[-1]))
    runner.trainable.settle()
    runner.close()
    everybody = all_gather_object(runner.mesh, (took_s, statistics.median(cpu_s), median_parts(parts)))
    shown = mean_parts([of_rank for _, _, of_rank in everybody])
    on_wall_s = sum(seconds for part, seconds in shown.items() if not part.startswith(WAITS))
    computed_s = statistics.fmean(cpu for _, cpu, _ in everybody)
    on_cpu = device.type == "cpu"
    return {
        "step_s": statistics.median(max(of_step) for of_step in zip(*(took for took, _, _ in everybody), strict=True)),
        "computed_s": computed_s if on_cpu else None,
        "core_share": min(1.0, computed_s / on_wall_s) if on_cpu else None,
        "parts": shown,
    }


def parts_of(events: Iterable[Event]) -> dict[str, float]:
    """Seconds by what they went to: an instruction's name over all layers and parts, or what was waited for."""
    out: defaultdict[str, float] = defaultdict(float)
    for e in events:
        if e.kind == COMPUTE:
            out[f"{e.phase} {e.name.split()[0]}"] += e.end_s - e.start_s
        elif e.kind == WAIT:
            out[f"{WAITS} {class_of(e)}"] += e.exposed_s
    return dict(out)


def whole(parts: dict[str, float], step_s: float) -> dict[str, float]:
    """The parts, and what is left of the step."""
    return parts | {BETWEEN: step_s - sum(parts.values())}


def median_parts(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(parts.get(name, 0.0) for parts in steps) for name in _names(steps)}


def mean_parts(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(parts.get(name, 0.0) for parts in ranks) for name in _names(ranks)}


def _names(of: Iterable[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for parts in of for name in parts))


@dataclass(frozen=True, slots=True)
class Checked:
    """One configuration.  `parts`: predicted and measured seconds of a step, by what they go to; `computed_s`: of what computes
    alone, predicted and as CPU time, which is right on a busy machine too; None on CUDA."""

    name: str
    predicted_s: float
    measured_s: float
    computed_s: tuple[float, float] | None
    core_share: float | None  # that a rank had while it computed
    parts: Mapping[str, tuple[float, float]]

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def causes(self) -> list[tuple[str, float]]:
        """Parts by how much longer the forecast takes them, the largest difference first."""
        differences = [(name, predicted - measured) for name, (predicted, measured) in self.parts.items()]
        return sorted(differences, key=lambda pair: -abs(pair[1]))


def overrides_of(world: int) -> dict[str, list[str]]:
    """The configurations that are run: the laptop's recipe with its experts cut over the ranks, the same model as copies, and
    a wider one with few tokens."""
    ep, launched = gcd(world, 8), f"launch.ranks={world}"
    return {
        "laptop": ["experiment=laptop", launched, f"parallel.ep={ep}", f"train.global_batch_size={4 * world}"],
        "copies": [
            *("model=laptop", launched, "parallel.ep=1", "train.seq_len=128"),
            *("train.micro_batch_size=2", f"train.global_batch_size={4 * world}"),
        ],
        "wide": [
            *("model=bench", launched, f"parallel.ep={ep}", "train.seq_len=128"),
            *("train.micro_batch_size=1", f"train.global_batch_size={world}"),
        ],
    }


def checked(name: str, config: PretrainConfig, world: int, *, vocab_size: int, measured: Mapping[str, Any]) -> Checked:
    """`measured`: as `trial_run` returns it."""
    found = forecast(config, world, vocab_size=vocab_size)
    predicted = whole(parts_of(found.timeline.events(0)), found.timeline.step_s)
    names = dict.fromkeys([*measured["parts"], *predicted])
    parts = {part: (predicted.get(part, 0.0), measured["parts"].get(part, 0.0)) for part in names}
    computed = None if measured["computed_s"] is None else (computed_s(predicted), measured["computed_s"])
    return Checked(name, found.step_s, measured["step_s"], computed, measured["core_share"], parts)


def computed_s(parts: Mapping[str, float]) -> float:
    """What isn't waited for."""
    return sum(seconds for part, seconds in parts.items() if not part.startswith(WAITS))


def busy(rows: list[Checked]) -> list[str]:
    """Configurations whose steps were disturbed, and how much of its core a rank had."""
    shares = {row.name: row.core_share for row in rows if row.core_share is not None}
    return [f"{name} ({share:.0%})" for name, share in shares.items() if share < LEAST_CORE_SHARE]


def table(rows: list[Checked]) -> str:
    lines = [f"{'':14}{'step':>12}{'':12}{'':9}{'what computes':>18}", f"{'configuration':14}" + 2 * HEAD]
    for row in rows:
        computes = "" if row.computed_s is None else _cells(*row.computed_s)
        lines.append(f"{row.name:14}{_cells(row.predicted_s, row.measured_s)}{computes}")
    for row in rows:
        lines += ["", f"{row.name}: where the forecast differs most, ms of a step", f"  {'':24}{'predicted':>10}{'measured':>10}"]
        for part, _ in row.causes[:SHOWN]:
            predicted_s, measured_s = row.parts[part]
            lines.append(f"  {part:24}{predicted_s * 1e3:10.1f}{measured_s * 1e3:10.1f}")
    return "\n".join(lines)


def _cells(predicted_s: float, measured_s: float) -> str:
    return f"{predicted_s * 1e3:9.1f} ms{measured_s * 1e3:9.1f} ms{predicted_s / measured_s - 1:+9.0%}"


def as_json(rows: list[Checked]) -> dict[str, Any]:
    return {
        row.name: {
            "predicted_s": row.predicted_s,
            "measured_s": row.measured_s,
            "error": row.error,
            "computed_s": row.computed_s and {"predicted": row.computed_s[0], "measured": row.computed_s[1]},
            "core_share": row.core_share,
            "parts_s": {part: {"predicted": p, "measured": m} for part, (p, m) in row.parts.items()},
        }
        for row in rows
    }
