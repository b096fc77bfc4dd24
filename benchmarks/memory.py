"""The memory of a rank, predicted and measured, for twelve configurations on 1, 2 and 4 ranks.

    python benchmarks/memory.py --json memory.json

Predicted: `megalina.perfmodel.sim.memory`, which walks the step's list with bytes in place of tensors, given how unevenly its
routers filled ranks and experts.  Measured: the most resident memory of a rank's process in its second step, above what it had
before the model was built.  malloc gives every block of 64 KiB or more pages of its own here and returns them at once, so that
resident memory is what is in use, not what an allocator holds on to.  Linux with glibc.

oneDNN, which computes bfloat16 products on CPU, keeps half a megabyte for each shape that it has met (1,024 at most), as much
again is kept by torch, and experts meet new shapes in every step.  That is no memory of the step, and is switched off here.
"""

import argparse
import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megalina.batch import Batch
from megalina.config import ModelConfig, OptimConfig, ParallelConfig, PretrainConfig, RouterConfig, StrategyConfig, TrainConfig
from megalina.launch import free_port
from megalina.mesh import build_mesh
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.sim.memory import memory_of
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.kept_memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

MODEL = ModelConfig(num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, num_experts=8, d_ff=256, vocab_size=1000)
FEW: dict[str, Any] = {"vocab_size": 250}  # then the peak is not where logits are
ATTENTION_ALONE: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 8, "num_experts": 2, "d_ff": 64, **FEW}  # the peak is there
LATENT: dict[str, Any] = {
    **{"attention": "mla", "q_lora_rank": 96, "kv_lora_rank": 64},
    **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
}
GPT2: dict[str, Any] = {"norm": "layernorm", "positions": "learned", "bias": True, "activation": "gelu", "tie_embeddings": False}
TRAIN = TrainConfig(global_batch_size=16, micro_batch_size=8, seq_len=256)
PIECES: dict[str, Any] = {"partition_bytes": "524288", "yields": True}
# ranks, then what differs: of the model, of training and the router, of the layout, of the strategy
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}, {}, {}),
    "one rank, bfloat16": (1, {**GPT2, "shared_d_ff": 256, **FEW}, {"dtype": "bfloat16"}, {}, {}),
    "one rank, all recomputed": (1, FEW, {"recompute": "full", "micro_batch_size": 16}, {}, {}),
    "one rank, dense layers, dropout": (1, {"moe_every": 2, "dropout": 0.1}, {"recompute": "selective"}, {}, {}),
    "ep 2": (2, FEW, {"balance_loss": 0.05}, {"ep": 2}, {}),
    "ep 2, ZeRO-1, lina, chunks": (2, {}, {}, {"ep": 2, "zero": 1}, {"name": "lina", "chunks": "2", **PIECES}),
    "ep 2, lancet": (2, FEW, {"micro_batch_size": 4}, {"ep": 2}, {"name": "lancet", "deferred_weights": "all"}),
    "ep 2, lancet in parts": (
        *(2, FEW, {"micro_batch_size": 4}, {"ep": 2}),
        {"name": "lancet", "deferred_weights": "all", "partition": "2"},
    ),
    "ep 2, router that needs the whole, in parts": (
        *(2, FEW, {"micro_batch_size": 4, "group": "micro_batch", "kind": "expert_choice"}, {"ep": 2}),
        {"name": "lancet", "partition": "2", "partition_backward": "mirrored"},
    ),
    "tp 2, lancet, all recomputed": (
        2,
        FEW,
        {"micro_batch_size": 4, "recompute": "full"},
        {"tp": 2},
        {"name": "lancet", "deferred_weights": "all"},
    ),
    "ep 2, flow, late weights": (2, FEW, {"micro_batch_size": 4}, {"ep": 2}, {"name": "flow", "parts": 2, "late_layers": 2}),
    "tp 2, bfloat16": (2, {"moe_every": 2, **FEW}, {"dtype": "bfloat16", "micro_batch_size": 16}, {"tp": 2}, {}),
    "tp 2, copied, ZeRO-1": (2, {"shared_d_ff": 256, **FEW}, {}, {"tp": 2, "sequence": False, "zero": 1}, {}),
    "ep 4, ZeRO-1, lina_zero": (
        *(4, {"num_experts": 16}, {"micro_batch_size": 4}, {"ep": 4, "zero": 1}),
        {"name": "lina_zero", "parts": 2, "chunks": "2", **PIECES},
    ),
    "ep 2, dense": (
        *(2, FEW, {"micro_batch_size": 4, "kind": "dense", "balance_loss": 0.0, "renormalize": False}, {"ep": 2}, {}),
    ),
    "one rank, dense, bfloat16": (
        *(1, {**GPT2, "shared_d_ff": 256, **FEW}),
        {"dtype": "bfloat16", "kind": "dense", "balance_loss": 0.0, "renormalize": False, "mutual_information_loss": 0.1},
        *({}, {}),
    ),
    "one rank, attention experts": (1, {"attention_experts": 2, "num_experts": 2, "d_ff": 64, **FEW}, {}, {}, {}),
    "one rank, latent attention": (1, {**LATENT, **ATTENTION_ALONE}, {}, {}, {}),
    "one rank, latent, short sequences": (1, {**LATENT, **ATTENTION_ALONE}, {"seq_len": 64, "micro_batch_size": 16}, {}, {}),
    "one rank, latent, bfloat16": (1, {**LATENT, **ATTENTION_ALONE}, {"dtype": "bfloat16"}, {}, {}),
    "one rank, windows, sinks": (
        *(1, {"attention_sinks": True, "window": 96, "full_attention_every": 2, **ATTENTION_ALONE}),
        *({"micro_batch_size": 16}, {}, {}),
    ),
    "tp 2, normed together": (2, {"qk_norm": "projection", **ATTENTION_ALONE}, {"micro_batch_size": 16}, {"tp": 2}, {}),
    "tp 2, latent, lancet": (
        *(2, {**LATENT, **ATTENTION_ALONE}, {"micro_batch_size": 16}, {"tp": 2}),
        {"name": "lancet", "deferred_weights": "all"},
    ),
    "ep 2, tp 2": (4, FEW, {"micro_batch_size": 4}, {"ep": 2, "tp": 2}, {}),
    "cp 2": (2, ATTENTION_ALONE, {"seq_len": 1024, "micro_batch_size": 2, "global_batch_size": 4}, {"cp": 2}, {}),
    "cp 2, heads exchanged": (
        *(2, ATTENTION_ALONE, {"seq_len": 1024, "micro_batch_size": 2, "global_batch_size": 4}),
        *({"cp": 2, "cp_kind": "all_to_all"}, {}),
    ),
    "cp 2, latent": (
        *(2, {**LATENT, **ATTENTION_ALONE}, {"seq_len": 1024, "micro_batch_size": 2, "global_batch_size": 4}),
        *({"cp": 2}, {}),
    ),
    "ep 2, once per rank": (2, FEW, {"micro_batch_size": 8, "top_k": 4}, {"ep": 2, "dispatch": "once_per_rank"}, {}),
    "ep 2, once per rank, bfloat16, chunks": (
        *(2, {"shared_d_ff": 256, **FEW}, {"dtype": "bfloat16", "recompute": "selective"}),
        *({"ep": 2, "dispatch": "once_per_rank"}, {"name": "lina", "chunks": "2", **PIECES}),
    ),
    "edp 2, ep 2, ddp, bfloat16": (
        4,
        {},
        {"dtype": "bfloat16", "micro_batch_size": 4},
        {"ep": 2},
        {"name": "ddp", "bucket_mb": 25},
    ),
}


def config_of(name: str) -> PretrainConfig:
    _, model, train, parallel, strategy = CASES[name]
    of_router = {f.name for f in fields(RouterConfig)}
    return PretrainConfig(
        model=replace(MODEL, **model),
        router=RouterConfig(**{k: v for k, v in train.items() if k in of_router}),
        train=replace(TRAIN, **{k: v for k, v in train.items() if k not in of_router}),
        parallel=ParallelConfig(**parallel),
        strategy=StrategyConfig(**strategy),
        optim=OptimConfig(),
    )


def batch_of(sequences: int, length: int, words_known: int, seed: int) -> Batch:
    """Random words, each sequence one document."""
    words = torch.randint(0, words_known, (sequences, length + 1), generator=torch.Generator().manual_seed(seed))
    every = torch.ones(sequences, length, dtype=torch.bool)
    position = torch.arange(length).repeat(sequences, 1)
    return Batch(words[:, :-1], words[:, 1:], every, every, position, None, torch.arange(sequences))


def predicted_and_measured(names: Sequence[str]) -> list[dict[str, Any]]:
    """Of this rank, in bytes; all ranks call it together."""
    libc = returning_memory_at_once()
    configs = [config_of(name) for name in names]
    for config in {c.train.dtype: c for c in configs}.values():  # libraries and connections come with the first step
        model = replace(config.model, num_layers=2, d_model=64, d_ff=32, shared_d_ff=0)
        _one(replace(config, model=model, train=replace(config.train, seq_len=160)), libc)
    return [_one(config, libc) for config in configs]


def returning_memory_at_once() -> ctypes.CDLL:
    """From now on this process holds on to no memory that it does not use; the C library."""
    os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}  # read when the first product is computed
    libc = ctypes.CDLL(None)
    for setting, size in ((M_MMAP_THRESHOLD, 2**16), (M_TRIM_THRESHOLD, 0)):
        if libc.mallopt(setting, size) != 1:
            raise OSError("malloc can't be told to give memory back at once; this needs glibc")
    return libc


def resident_bytes() -> int:
    """Of this process."""
    return _status("VmRSS")


def high_water_bytes() -> int:
    """The most since the mark was reset."""
    return _status("VmHWM")


def _one(config: PretrainConfig, libc: ctypes.CDLL) -> dict[str, Any]:
    mesh = build_mesh(tp=config.parallel.tp, ep=config.parallel.ep, cp=config.parallel.cp)
    own, length, vocab_size = config.train.global_batch_size // mesh.readers, config.train.seq_len, config.model.vocab_size
    gc.collect()
    libc.malloc_trim(0)
    before = resident_bytes()
    trainable = Trainable(config, mesh, vocab_size=vocab_size, device=torch.device("cpu"), wish_to_stop=lambda: False)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    first = batch_of(own, length, vocab_size, mesh.reader)
    trainable.step(first, optimizer.update, directions=optimizer)  # moments get their memory
    batch = batch_of(own, length, vocab_size, mesh.world.size + mesh.reader)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    result = trainable.step(batch, optimizer.update, directions=optimizer)
    measured = high_water_bytes() - before
    layers, moe_layers = config.model.num_layers, trainable.gpt.moe_layers
    skews = skews_of(result, moe_layers, layers, ep=mesh.ep.size, ep_rank=mesh.ep.rank)
    sizes = InstructionBytes(
        config,
        mesh.world.size,
        vocab_size=vocab_size,
        skew=skews["skew"],
        expert_skew=skews["expert_skew"],
        piece_bytes=trainable.plan.piece_bytes,
    )
    memory = memory_of(sizes, trainable.program)
    trainable.settle()
    trainable.close()
    trainable._evaluation.close()
    same = sizes.buckets == {name: bucket.spec for name, bucket in trainable.buckets.items()}
    return {
        "predicted": memory.peak,
        "measured": measured,
        "instruction": memory.instruction,
        "rows": memory.rows(),
        "same_buckets": same,
    }


def skews_of(result: StepResult, moe_layers: Sequence[int], num_layers: int, *, ep: int, ep_rank: int) -> dict[str, list[float]]:
    """How unevenly a step's routers filled this rank and its experts, by layer; 1 where there are none."""
    rows_LE = result.loads[:, :-1].double()
    here_Le = rows_LE.chunk(ep, 1)[ep_rank]
    skew_L = (here_Le.sum(1) / rows_LE.sum(1) * ep).tolist()
    expert_skew_L = (here_Le.amax(1) / here_Le.mean(1)).tolist()
    places = {layer: i for i, layer in enumerate(moe_layers)}
    return {
        name: [of_L[places[layer]] if layer in places else 1.0 for layer in range(num_layers)]
        for name, of_L in (("skew", skew_L), ("expert_skew", expert_skew_L))
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _rank(rank: int, world: int, port: int, folder: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    found = predicted_and_measured(names)
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, names: Sequence[str]) -> list[list[dict[str, Any]]]:
    """By rank, then by case."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, free_port(), folder, names), nprocs=world)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]


def error_of(found: Mapping[str, Any]) -> float:
    return float(found["predicted"] / found["measured"] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args()
    table: dict[str, dict[str, Any]] = {}
    print(f"{'of the rank that is furthest off':34} {'predicted MB':>12} {'measured MB':>12} {'error':>7}  peak in")
    for world in (1, 2, 4):
        names = [name for name, case in CASES.items() if case[0] == world and options.only in name]
        if not names:
            continue
        for name, ranks in zip(names, zip(*measure(world, names), strict=True), strict=True):
            worst = max(ranks, key=lambda found: abs(error_of(found)))
            table[name] = {**worst, "error": error_of(worst)}
            print(
                f"{name:34} {worst['predicted'] / 1e6:12.1f} {worst['measured'] / 1e6:12.1f} {error_of(worst):7.1%}  "
                f"{worst['instruction']}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    from megalina.console import command

    command(main)
