"""What watching costs: a step of model=laptop on two expert-parallel ranks with ledger and doctor against without.

    python benchmarks/overhead.py --json overhead.json

One process group, in which blocks of steps follow each other in turn: nothing, the doctor (log of collectives, position,
files that mirror both, and the doctor's thread), the ledger (digests of tokens and routing, its line on disk), both.  A
round has one block of each, in an order that moves on by one each round, so that a noisy machine disturbs all alike.  A
block's time is the median of its steps; the ratio to the same round's block of nothing is taken, then medians over rounds.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
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
from megalina.rank_files import collectives_path, position_path
from megalina.train.doctor import Doctor
from megalina.train.trainer import Run

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LENGTH = 4096, 256
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


class Watched:
    """A run whose doctor and ledger can be taken away."""

    def __init__(self, run: Run):
        self.run, self.log, self.folder = run, run.mesh.log, Path(run.config.run.dir)
        self._real = {name: getattr(self.log, name) for name in ("submit", "riders")}
        self._doctor: Doctor | None = None

    def switch(self, *, doctor: bool, ledger: bool) -> None:
        """All ranks together, between steps."""
        self.run.config.train.ledger = self.run.trainable.stage_functions.ledger = ledger
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
    run = Run(config, data, device=torch.device("cpu"), tracker=None)
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
                run.compute(step)
                block.append(time.perf_counter() - started_s)
            if turn >= 0:
                times[name].append(block[1:])
        if run.is_first and turn >= 0:
            print(f"round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    watched.switch(doctor=False, ledger=False)
    if run.is_first:
        entries = len(run.trainable.program)
        (folder / "times.json").write_text(json.dumps({"times": times, "stages": entries}))
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
    parser.add_argument("--rounds", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block that count (default 5)")
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
        "stages": measured["stages"],
    } | results(measured["times"])
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return None


if __name__ == "__main__":
    main()
