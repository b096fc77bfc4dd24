"""What timing costs: a step of model=laptop on two expert-parallel ranks with timeline.metrics=true against without.

    python benchmarks/timeline_overhead.py --json timeline_overhead.json

One process group, in which single steps with and without timing follow each other; who is first changes from pair to pair.
A step's time has all in it that timing adds: recording, the ends of collectives, the sums over ranks and the record's
numbers; the calibration, once at the start of a run, is not.  Printed are the medians of both, and the median over pairs of
the ratio within a pair.

What is to be seen is smaller than the noise of a shared machine, so the steps with timing also have a clock around what
happens after the step and around each event as it is recorded: "spent" is that as a share of the step, waiting for the other
rank included.  "cpu_spent" is the processor's time for the same as a share of the whole step's, which hardly depends on what
else the machine does.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.config import TimelineConfig
from megalina.data.source import open_data
from megalina.launch import run_ranks
from megalina.timeline.recorder import Recorder
from megalina.train.timing import Timing
from megalina.train.trainer import Trainer

WARM_UP_STEPS = 4


class Clocked:
    """Adds up the time that is spent in the `add` of recorders, from all threads."""

    def __init__(self) -> None:
        self.spent_s, self.events = 0.0, 0
        add = Recorder.add

        def clocked(recorder: Recorder, *arguments: Any) -> None:
            started_s = time.perf_counter()
            add(recorder, *arguments)
            self.spent_s += time.perf_counter() - started_s
            self.events += 1

        Recorder.add = clocked  # type: ignore[method-assign]


def work(folder: Path, pairs: int) -> None:
    """One rank; rank 0 writes {"off": step times in s, "on": the same, "after": of them after the step, ...}."""
    from overhead import LENGTH, config_of

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = config_of(folder)
    data = open_data(config.data, seq_len=LENGTH, seed=config.train.seed)
    run = Trainer(config, data, device=torch.device("cpu"), tracker=None)
    run.begin(None)
    timings = {
        name: Timing(replace(config, timeline=TimelineConfig(metrics=metrics)), run.built)
        for name, metrics in (("off", False), ("on", True))
    }
    times: dict[str, list[float]] = {"off": [], "on": [], "after": [], "step_cpu": [], "after_cpu": []}
    clocked, step = Clocked(), 0
    for pair in range(-WARM_UP_STEPS, pairs):
        if pair == 0:
            clocked.spent_s, clocked.events = 0.0, 0
        for name in ("off", "on") if pair % 2 else ("on", "off"):
            step += 1
            dist.barrier()
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            recorder = timings[name].recorder(step)
            run.runner.compute(step, record=recorder)
            ended_s, ended_cpu_s = time.perf_counter(), time.process_time()
            timings[name].after(step, recorder)
            done_s, done_cpu_s = time.perf_counter(), time.process_time()
            if pair >= 0:
                times[name].append(done_s - started_s)
                if name == "on":
                    times["after"].append(done_s - ended_s)
                    times["after_cpu"].append(done_cpu_s - ended_cpu_s)
                else:
                    times["step_cpu"].append(ended_cpu_s - started_cpu_s)
        if run.runner.is_first and pair >= 0 and (pair + 1) % 20 == 0:
            print(f"pair {pair + 1}/{pairs}", file=sys.stderr, flush=True)
    if run.runner.is_first:
        found = times | {"recording_s": clocked.spent_s / pairs, "events": clocked.events / pairs}
        (folder / "times.json").write_text(json.dumps(found))
    run.runner.close()
    dist.destroy_process_group()


def results(measured: dict[str, Any]) -> dict[str, Any]:
    off, on = measured["off"], measured["on"]
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    step_s = statistics.median(off)
    after_s, after_cpu_s = statistics.median(measured["after"]), statistics.median(measured["after_cpu"])
    return {
        "step_off_s": step_s,
        "step_on_s": statistics.median(on),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": _quartiles(ratios),
        "step_off_quartiles_s": _quartiles(off),
        "step_on_quartiles_s": _quartiles(on),
        "events_a_step": measured["events"],
        "after_a_step_s": after_s,
        "recording_a_step_s": measured["recording_s"],
        "spent": (after_s + measured["recording_s"]) / step_s,
        "after_a_step_cpu_s": after_cpu_s,
        "cpu_spent": (after_cpu_s + measured["recording_s"]) / statistics.median(measured["step_cpu"]),
    }


def _quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    first, _, third = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [first, third]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of steps (default 100)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs} must be at least 1")
    if options.folder:
        return work(options.folder, options.pairs)
    from overhead import write_tokens

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens")
        run_ranks([sys.executable, __file__, "--pairs", str(options.pairs), "--folder", name], ranks=2, logs=folder / "logs")
        measured = json.loads((folder / "times.json").read_text())
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "pairs": options.pairs}
    text = json.dumps(machine | results(measured), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return None


if __name__ == "__main__":
    from megalina.console import command

    command(main)
