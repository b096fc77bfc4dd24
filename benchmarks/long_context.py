"""One long sequence on 1, 2 and 4 ranks of context parallelism: a rank's memory, predicted and measured, step time, equal losses.

    python benchmarks/long_context.py --json long_context.json
    python benchmarks/long_context.py --length 4096 --ranks 1,2 model.num_kv_heads=2

A step is of one sequence.  Predicted and measured are as in `benchmarks/memory.py`: the priced peak, and the most resident memory
of a rank's process in a step above what it had before the model was built, of the rank that has the most.  Activations are what
is above weights, gradients, optimizer and the words of the whole sequence, which each rank has.  Ranks share the machine's cores,
so step times say what is computed twice, not what several machines would gain.  Linux with glibc.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benchmarks`, of which this is a program

from benchmarks.memory import batch_of, high_water_bytes, resident_bytes, returning_memory_at_once
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.launch import free_port
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.sim.memory import memory_of
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.validate import check_config

KINDS = ("all_gather", "all_to_all")
SHORT = 256  # tokens


def config_of(overrides: Sequence[str], *, length: int, cp: int, kind: str) -> PretrainConfig:
    config = compose(["model=tiny", *overrides])
    train = replace(config.train, seq_len=length, global_batch_size=1, micro_batch_size=1)
    model = replace(config.model, vocab_size=config.model.vocab_size or 512)
    parallel = replace(config.parallel, cp=cp, cp_kind=kind if cp > 1 else KINDS[0])
    config = replace(config, model=model, train=train, parallel=parallel)
    check_config(config, cp)
    return config


def measured(config: PretrainConfig, steps: int) -> dict[str, Any]:
    """Of this rank; all ranks call it together."""
    libc = returning_memory_at_once()
    mesh, train, vocab_size = build_mesh(cp=config.parallel.cp), config.train, config.model.vocab_size
    gc.collect()
    libc.malloc_trim(0)
    before = resident_bytes()
    trainable = Trainable(config, mesh, vocab_size=vocab_size, device=torch.device("cpu"), wish_to_stop=lambda: False)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    losses, seconds, peak = [], [], 0
    for step in range(steps + 1):
        batch = batch_of(1, train.seq_len, vocab_size, step)
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        began_s = time.perf_counter()
        losses.append(trainable.step(batch, optimizer.update, directions=optimizer).loss)
        seconds.append(time.perf_counter() - began_s)
        peak = high_water_bytes() - before
    sizes = InstructionBytes(config, mesh.world.size, vocab_size=vocab_size)
    memory = memory_of(sizes, trainable.program)
    trainable.close()
    return {
        "measured": peak,
        "predicted": memory.peak,
        "state": sum(sizes.state.values()),
        "instruction": memory.instruction,
        "step_s": sorted(seconds[1:])[len(seconds[1:]) // 2],
        "losses": losses,
    }


def _rank(rank: int, world: int, port: int, folder: str, config: PretrainConfig, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    measured(replace(config, train=replace(config.train, seq_len=SHORT)), 1)  # libraries and connections come with the first step
    Path(folder, str(rank)).write_text(json.dumps(measured(config, steps)))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(config: PretrainConfig, steps: int) -> list[dict[str, Any]]:
    world = config.parallel.cp
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, free_port(), folder, config, steps), nprocs=world)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens of the sequence")
    parser.add_argument("--ranks", default="1,2,4", help="values of parallel.cp, the first one 1")
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed, after one that is not")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("overrides", nargs="*", help="as of pretrain_gpt_moe.py; the model is tiny")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    print(f"{'cp':14} {'predicted MB':>12} {'measured MB':>11} {'activations MB':>14} {'of cp 1':>7} {'step s':>7}  loss")
    for cp in map(int, options.ranks.split(",")):
        for kind in KINDS if cp > 1 else KINDS[:1]:
            ranks = on_ranks(config_of(options.overrides, length=options.length, cp=cp, kind=kind), options.steps)
            most = max(ranks, key=lambda rank: rank["measured"])
            activations = most["measured"] - most["state"]
            found.append({"cp": cp, "kind": kind if cp > 1 else "", "ranks": ranks, "activations": activations})
            share = activations / found[0]["activations"]
            name = f"{cp} {kind}" if cp > 1 else "1"
            bytes_of = f"{most['predicted'] / 1e6:12.1f} {most['measured'] / 1e6:11.1f} {activations / 1e6:14.1f}"
            print(f"{name:14} {bytes_of} {share:7.2f} {most['step_s']:7.2f}  {most['losses'][-1]:.9f}", flush=True)
    first = found[0]["ranks"][0]["losses"]
    apart = max(abs(a - b) for row in found for rank in row["ranks"] for a, b in zip(rank["losses"], first, strict=True))
    print(f"losses of {len(first)} steps are at most {apart:.1e} apart")
    if options.json:
        options.json.write_text(json.dumps({"length": options.length, "rows": found, "apart": apart}, indent=1) + "\n")


if __name__ == "__main__":
    from megalina.console import command

    command(main)
