"""A short run of the real trainer, to hold a forecast against: how long its steps take, and where their time goes."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megalina.config import PretrainConfig
from megalina.data.source import open_data
from megalina.mesh import everybodys
from megalina.timeline.contention import class_of
from megalina.timeline.recorder import COMPUTE, WAIT, Event, Recorder
from megalina.train.step_runner import StepRunner

WARM_UP = 3  # steps: allocators, caches, pages of the optimizer's state
BETWEEN = "between instructions"  # all that is in no instruction and no wait
WAITS = "waits for"


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
        everybodys(runner.mesh, None)
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
    everybody = everybodys(runner.mesh, (took_s, statistics.median(cpu_s), median_parts(parts)))
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
