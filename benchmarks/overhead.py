"""What watching costs: a step of model=laptop on two expert-parallel ranks with ledger and doctor against without.

    python benchmarks/overhead.py --json overhead.json

One process group, in which blocks of steps follow each other in turn: nothing, the doctor (log of collectives, position,
files that mirror both, and the doctor's thread), the ledger (digests of tokens and routing, its line on disk), both.  A
round has one block of each, in an order that moves on by one each round, so that a noisy machine disturbs all alike.  A
block's time is the median of its steps; the ratio to the same round's block of nothing is taken, then medians over rounds.

What is to be seen is smaller than the noise of a shared machine, so at the end some steps are run with a clock around every
call that watching adds (and the doctor's thread asked for its CPU time): "spent" is that time as a share of the step, the
clocks' own time included.  It can't see what watching costs others, such as caches; the ratios can.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml

from megalina.config import (
    DataConfig,
    HangConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
)
from megalina.data.indexed import IndexedWriter
from megalina.data.source import open_data
from megalina.launch import run_ranks
from megalina.parallel import functions
from megalina.rank_files import collectives_path, position_path
from megalina.train import step_runner
from megalina.train.doctor import Doctor
from megalina.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LENGTH, SPENT_STEPS = 4096, 256, 30
VARIANTS = {"nothing": (False, False), "doctor": (True, False), "ledger": (False, True), "both": (True, True)}  # doctor, ledger


def config_of(folder: Path) -> PretrainConfig:
    """experiment=laptop, on random tokens."""
    model = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / "laptop.yaml").read_text()))
    return PretrainConfig(
        run=RunConfig(dir=str(folder)),
        launch=LaunchConfig(device="cpu"),
        model=model,
        parallel=ParallelConfig(ep=2),
        data=DataConfig(kind="indexed", prefix=str(folder / "tokens"), cache_dir=str(folder / "cache")),
        train=TrainConfig(steps=10**6, global_batch_size=8, micro_batch_size=4, seq_len=LENGTH),
        hang=HangConfig(timeout_s=120.0),
    )


def write_tokens(prefix: Path) -> None:
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(200):
            writer.add_document(random.integers(0, VOCABULARY, int(random.integers(100, 5000))))


class Clocked:
    """Adds up the time spent in the calls that watching adds to a step."""

    def __init__(self, run: Trainer):
        self.spent_s: dict[str, float] = {"doctor": 0.0, "ledger": 0.0}
        log = run.runner.log
        for name in ("submit", "riders"):
            setattr(log, name, self._around(getattr(log, name), "doctor"))
        for name in ("enter", "leave"):
            setattr(log.position, name, self._around(getattr(log.position, name), "doctor"))
        for name in ("routing_digest", "tokens_digest"):
            setattr(functions, name, self._around(getattr(functions, name), "ledger"))
        for name in ("RandomState", "line_of"):
            setattr(step_runner, name, self._around(getattr(step_runner, name), "ledger"))
        run.state.ledger.add = self._around(run.state.ledger.add, "ledger")  # type: ignore[method-assign]

    def _around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def clocked(*arguments: Any, **options: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent_s[part] += time.perf_counter() - started_s

        return clocked


def thread_cpu_s(native_id: int) -> float:
    """CPU time of a thread of this process, to 10 ms."""
    fields = Path(f"/proc/self/task/{native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spent(run: Trainer, watched: "Watched", first_step: int, steps: int) -> dict[str, float]:
    """Shares of `steps` steps that are spent in watching."""
    watched.switch(doctor=True, ledger=True)
    clocked, thread = Clocked(run), watched.doctor_thread
    dist.barrier()
    before_s, started_s = thread_cpu_s(thread), time.perf_counter()
    for step in range(first_step, first_step + steps):
        run.runner.compute(step)
    whole_s = time.perf_counter() - started_s
    beats_s = thread_cpu_s(thread) - before_s
    return {
        "doctor": (clocked.spent_s["doctor"] + beats_s) / whole_s,
        "ledger": clocked.spent_s["ledger"] / whole_s,
        "both": (sum(clocked.spent_s.values()) + beats_s) / whole_s,
    }


class Watched:
    """A run whose doctor and ledger can be taken away."""

    def __init__(self, run: Trainer):
        self.run, self.log, self.folder = run, run.runner.log, Path(run.config.run.dir)
        self._real = {name: getattr(self.log, name) for name in ("submit", "riders")}
        self._doctor: Doctor | None = None

    @property
    def doctor_thread(self) -> int:
        assert self._doctor is not None and self._doctor._thread is not None and self._doctor._thread.native_id is not None
        return self._doctor._thread.native_id

    def switch(self, *, doctor: bool, ledger: bool) -> None:
        """All ranks together, between steps."""
        self.run.config.train.ledger = self.run.built.trainable.instruction_functions.ledger = ledger
        if self._doctor is not None:
            self._doctor.stop()
            self._doctor = None
        log, position = self.log, self.log.position
        if not doctor:
            log.submit, log.riders = lambda *_: None, lambda: [0.0] * 5  # type: ignore[method-assign]
            position.enter = lambda tag, waits: None  # type: ignore[method-assign]
            return
        for name, method in self._real.items():
            setattr(log, name, method)
        position.__dict__.pop("enter", None)
        world, rank = dist.get_world_size(), dist.get_rank()
        self._doctor = Doctor(log, world=world, rank=rank, timeout_s=120.0, folder=self.folder / "logs")
        self._doctor.start()
        assert position_path(self.folder / "logs", rank).exists() and collectives_path(self.folder / "logs", rank).exists()


def work(folder: Path, rounds: int, steps: int) -> None:
    """One rank; rank 0 writes the times [variant][round][step] in seconds."""
    dist.init_process_group("gloo")
    config = config_of(folder)
    data = open_data(config.data, seq_len=LENGTH, seed=config.train.seed)
    run = Trainer(config, data, device=torch.device("cpu"), tracker=None)
    run.begin(None)
    watched, names, step = Watched(run), list(VARIANTS), 0
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(-1, rounds):  # the first round warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            doctor, ledger = VARIANTS[name]
            watched.switch(doctor=doctor, ledger=ledger)
            dist.barrier()
            block = []
            for _ in range(steps + 1):  # the first step of a block still meets the last block's caches
                step += 1
                started_s = time.perf_counter()
                run.runner.compute(step)
                block.append(time.perf_counter() - started_s)
            if turn >= 0:
                times[name].append(block[1:])
        if run.runner.is_first and turn >= 0:
            print(f"round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    shares = spent(run, watched, step + 1, SPENT_STEPS)
    watched.switch(doctor=False, ledger=False)
    if run.runner.is_first:
        entries = len(run.built.trainable.program)
        (folder / "times.json").write_text(json.dumps({"times": times, "instructions": entries, "spent": shares}))
    dist.destroy_process_group()


def results(times: dict[str, list[list[float]]]) -> dict[str, Any]:
    blocks = {name: [statistics.median(block) for block in rounds] for name, rounds in times.items()}
    found: dict[str, Any] = {"step_s": {name: statistics.median(values) for name, values in blocks.items()}}
    for name in ("doctor", "ledger", "both"):
        ratios = sorted(a / b for a, b in zip(blocks[name], blocks["nothing"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        found[f"{name}_over_nothing"] = statistics.median(ratios)
        found[f"{name}_over_nothing_quartiles"] = [quartiles[0], quartiles[2]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=60, help="rounds (default 60)")
    parser.add_argument("--steps", type=int, default=1, help="steps of a block that count (default 1)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        return work(options.folder, options.rounds, options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens")
        count = ["--rounds", str(options.rounds), "--steps", str(options.steps)]
        run_ranks([sys.executable, __file__, *count, "--folder", name], ranks=2, logs=folder / "logs")
        measured = json.loads((folder / "times.json").read_text())
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "steps": options.steps,
        "instructions": measured["instructions"],
        "spent": measured["spent"],
    } | results(measured["times"])
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return None


if __name__ == "__main__":
    from megalina.console import command

    command(main)
