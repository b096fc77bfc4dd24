"""One rank of a measurement: torch's schedules and our lists train the same model in one job and take turns.

python -m benchmarks.pipelining.turns SPEC      (with torchrun's variables)
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from benchmarks.memory import batch_of
from benchmarks.pipelining.tables import kind_of
from benchmarks.pipelining.torch_model import whole_model
from benchmarks.pipelining.torch_step import TorchPipeline
from megalina.batch import Batch
from megalina.blocks.pipelined import pipelined
from megalina.comm.urgency import other_threads_are_urgent
from megalina.config import PretrainConfig
from megalina.console import StatusLine
from megalina.mesh import Mesh, build_meshes
from megalina.parallel.emulated_device import EmulatedDevice
from megalina.parallel.trainable import DTYPES, Trainable
from megalina.timeline.recorder import WAIT, Recorder
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.worker import load_config

TORCH, LATE, OURS = "torch", "torch, late receives", "ours"
BATCHES = 4  # that are walked through again and again


class Side(Protocol):
    device: EmulatedDevice | None

    def step(self, batch: Batch) -> tuple[float, float]:
        """Loss, and how long this rank stood still for messages, s."""
        ...


class Ours:
    """A list of ours on this rank."""

    def __init__(self, config: PretrainConfig, mesh: Mesh):
        vocab_size = config.model.vocab_size
        self._trainable = Trainable(config, mesh, vocab_size=vocab_size, device=torch.device("cpu"), wish_to_stop=lambda: False)
        self._optimizer = BucketOptimizer(config.optim, self._trainable.buckets)
        self.device = self._trainable.device

    def step(self, batch: Batch) -> tuple[float, float]:
        recorder = Recorder()
        result = self._trainable.step(batch, self._optimizer.update, directions=self._optimizer, record=recorder)
        waits = (e for e in recorder.events() if e.kind == WAIT and e.op in ("send", "recv"))
        return result.loss, sum(e.exposed_s for e in waits)


@dataclass(slots=True)
class Measured:
    """One side with one schedule, as this rank saw it; lists have a number for each timed step but for losses, which are all."""

    step_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)  # of the emulated device
    overrun_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def main(spec_path: str) -> int:
    """`SPEC`: JSON with configs {schedule: YAML}, sides {schedule: [TORCH, ...]}, rounds, turn, timeout_s, out."""
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=spec["timeout_s"]))
    configs = {name: load_config(text) for name, text in spec["configs"].items()}
    meshes = _meshes(list(configs.values()))
    first = next(iter(configs.values()))
    weights = dict(whole_model(first, dtype=DTYPES[first.train.dtype]).named_parameters())
    sides: dict[tuple[str, str], Side] = {}
    for name, config in configs.items():
        for side in spec["sides"][name]:
            if side == OURS:
                sides[name, side] = Ours(config, meshes)
            else:
                kind, size = kind_of(name), config.model.vocab_size
                sides[name, side] = TorchPipeline(config, kind, weights, vocab_size=size, late_receives=side == LATE)
    if next(iter(sides.values())).device is not None:
        other_threads_are_urgent()
    train, words = first.train, first.model.vocab_size
    batches = [batch_of(train.global_batch_size, train.seq_len, words, seed) for seed in range(BATCHES)]
    own = in_turns(sides, batches, rounds=spec["rounds"], turn=spec["turn"])
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {key: asdict(measured) for key, measured in own.items()})
    if dist.get_rank() == 0:
        found: dict[str, dict[str, Any]] = {name: {} for name in configs}
        for name, side in sides:
            found[name][side] = over_ranks([of_rank[name, side] for of_rank in everywhere])
        Path(spec["out"]).write_text(json.dumps(found, allow_nan=False))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _meshes(configs: Sequence[PretrainConfig]) -> Mesh:
    """One mesh for all schedules: its axes are those that any of them needs."""
    world = dist.get_world_size()
    across: dict[str, tuple[int, ...]] = {}
    for config in configs:
        across |= pipelined(config, world).across
    return build_meshes(pp=configs[0].parallel.pp, across=across)[1]


def in_turns(
    sides: Mapping[tuple[str, str], Side], batches: Sequence[Batch], *, rounds: int, turn: int
) -> dict[tuple[str, str], Measured]:
    """Rounds in which each side takes `turn` timed steps after one that isn't timed; the order of turns rotates.  One round
    before them warms up.  All ranks call it together."""
    out = {key: Measured() for key in sides}
    order, status, began_s, done = list(sides), StatusLine(), time.monotonic(), 0
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would slow down one side's turn
    try:
        for number in range(rounds + 1):
            at = number % len(order)
            for key in order[at:] + order[:at]:
                if dist.get_rank() == 0:
                    total = (rounds + 1) * len(order)
                    left_s = (time.monotonic() - began_s) / done * (total - done) if done else 0.0
                    status.show(f"{done}/{total}{f', {left_s:.0f} s left' if done else ''}  {' '.join(key)}")
                _take_turn(sides[key], out[key], batches, turn if number else 0)
                done += 1
    finally:
        gc.enable()
        gc.unfreeze()
        status.end()
    return out


def _take_turn(side: Side, measured: Measured, batches: Sequence[Batch], timed: int) -> None:
    gc.collect()
    dist.barrier()
    for i in range(timed + 1):
        device = side.device
        busy_s, overrun_s = (device.busy_s, device.overrun_s) if device is not None else (0.0, 0.0)
        began_s = time.perf_counter()
        loss, waits_s = side.step(batches[len(measured.losses) % len(batches)])
        step_s = time.perf_counter() - began_s
        measured.losses.append(loss)
        if i:
            measured.step_s.append(step_s)
            measured.waits_s.append(waits_s)
            if device is not None:
                measured.busy_s.append(device.busy_s - busy_s)
                measured.overrun_s.append(device.overrun_s - overrun_s)


def over_ranks(of_ranks: Sequence[Mapping[str, list[float]]]) -> dict[str, Any]:
    """A step is as long as its slowest rank's; waits are the mean over ranks, and so is what devices are busy."""
    by_step = {key: list(zip(*(of_rank[key] for of_rank in of_ranks), strict=True)) for key in of_ranks[0]}
    busy, overrun = ([statistics.fmean(step) for step in by_step[key]] for key in ("busy_s", "overrun_s"))
    return {
        "step_s": list(map(max, by_step["step_s"])),
        "waits_s": list(map(statistics.fmean, by_step["waits_s"])),
        "busy_s": busy,
        "overrun_fraction": statistics.median([late / of for late, of in zip(overrun, busy, strict=True)] or [0.0]),
        "losses": of_ranks[0]["losses"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
