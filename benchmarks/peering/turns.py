"""One rank of a measurement: peers and megalina train the ladder's model in one job and take turns.

python -m benchmarks.peering.turns SPEC      (with torchrun's variables)
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist

from benchmarks.peering.model import random_tokens
from benchmarks.peering.pace import Pace
from benchmarks.peering.systems import PEERS, variants_of
from megalina.compare.interleaved import MOST_SEARCH_STEPS, PeakMemory
from megalina.config import PretrainConfig
from megalina.console import StatusLine
from megalina.data.source import TokenData, open_data
from megalina.train.step_runner import StepRunner
from megalina.worker import load_config


@dataclass(slots=True)
class Contestant:
    """What takes turns, and what this rank saw of it; figures per timed step."""

    name: str
    step: Callable[[int], tuple[float, float, float]]  # number of the step -> loss, busy s, overrun s
    step_s: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)  # of the emulated device
    overrun_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    steps: int = 0  # of all, timed or not


def main(spec_path: str) -> int:
    """`SPEC`: JSON with peer (YAML of what peers train), peers (names), ours {name: YAML}, rounds, turn, timeout_s, out."""
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=spec["timeout_s"]))
    ours = {name: load_config(text) for name, text in spec["ours"].items()}
    first = load_config(spec["peer"])
    data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
    if "deepspeed" in spec["packages"]:
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    peers = []
    for title, peer, tuned in variants_of([peer for peer in PEERS if peer.name in spec["peers"]]):
        pace = Pace()
        step = peer.build(first, data.vocab_size, pace, tuned)
        peers.append(Contestant(title, paced_step(step, pace, first, data.vocab_size)))
    contestants = [*(contestant_of(name, config, data) for name, config in ours.items()), *peers]
    in_turns(contestants, rounds=spec["rounds"], turn=spec["turn"])
    everywhere: list[Any] = [None] * dist.get_world_size()
    own = {c.name: {k: v for k, v in asdict(c).items() if k not in ("step", "name")} for c in contestants}
    dist.all_gather_object(everywhere, own)
    if dist.get_rank() == 0:
        Path(spec["out"]).write_text(json.dumps(everywhere, allow_nan=False))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def contestant_of(name: str, config: PretrainConfig, data: TokenData) -> Contestant:
    """Megalina, which has searched as long as its strategy wants to."""
    runner = StepRunner(config, data, device=torch.device("cpu"))

    def step(_: int) -> tuple[float, float, float]:
        device = runner.trainable.device
        busy_s, overrun_s = (device.busy_s, device.overrun_s) if device is not None else (0.0, 0.0)
        result = runner.compute(runner.state.step + 1)[0]
        if device is None:
            return result.loss, 0.0, 0.0
        return result.loss, device.busy_s - busy_s, device.overrun_s - overrun_s

    for _ in range(MOST_SEARCH_STEPS):
        if not runner.undecided:
            break
        began_s = time.perf_counter()
        step(0)
        runner.adapt(time.perf_counter() - began_s)
    return Contestant(name, step)


def paced_step(
    step: Callable[[torch.Tensor], float], pace: Pace, config: PretrainConfig, vocab_size: int
) -> Callable[[int], tuple[float, float, float]]:
    rank = dist.get_rank()

    def run(number: int) -> tuple[float, float, float]:
        busy_s, overrun_s = pace.busy_s, pace.overrun_s
        loss = step(random_tokens(config, vocab_size, rank=rank, step=number))
        return loss, pace.busy_s - busy_s, pace.overrun_s - overrun_s

    return run


def in_turns(contestants: Sequence[Contestant], *, rounds: int, turn: int) -> None:
    """A round that warms up, then rounds in which each takes `turn` timed steps after one that isn't; the order rotates."""
    began_s, status, total = time.monotonic(), StatusLine(), (rounds + 1) * len(contestants)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a turn would slow the one whose turn it is
    done = 0
    for number in range(rounds + 1):
        at = number % len(contestants)
        for contestant in (*contestants[at:], *contestants[:at]):
            gc.collect()
            dist.barrier()
            with PeakMemory() as memory:
                take_turn(contestant, turn, timed=number > 0)
            contestant.peak_bytes = max(contestant.peak_bytes, memory.peak_bytes)
            done += 1
            if dist.get_rank() == 0:
                left_s = (time.monotonic() - began_s) / done * (total - done)
                status.show(f"{done}/{total}, {left_s:.0f} s left  {contestant.name}")
    gc.enable()
    status.end()


def take_turn(contestant: Contestant, turn: int, *, timed: bool) -> None:
    for i in range(turn + 1):
        began_s = time.perf_counter()
        loss, busy_s, overrun_s = contestant.step(contestant.steps)
        step_s = time.perf_counter() - began_s
        contestant.steps += 1
        contestant.losses.append(loss)
        if timed and i:
            contestant.step_s.append(step_s)
            contestant.busy_s.append(busy_s)
            contestant.overrun_s.append(overrun_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
