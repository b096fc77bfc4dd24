"""A Hugging Face checkpoint taken in, and loaded on ranks: time and peak memory, beside transformers' own from_pretrained.

    python benchmarks/import_checkpoint.py --json import_checkpoint.json

transformers writes a random Qwen3-MoE of 340 million parameters in bfloat16 (8 MoE layers, 32 experts), in small and in large
shards, and one of half as many layers.  `import_folder` takes each of them in; then `train.init_from` loads the first one on one
process and on 4 ranks (tp=2, ep=2, ZeRO-1), and its weights alone are loaded by megalina and by transformers.

Memory is the most resident memory of a process (VmHWM, reset before) above what it had before, its libraries being there; pages
of mapped files count.  An import may need one shard, mapped, and one of our tensors.  A rank of a run also has float32 gradients
and the optimizer's state: that is "before", without the load, and "after", with it.  Files come from the page cache, which has
just written them.  Needs Linux, and `pip install 'megalina[hf]'`.
"""

import argparse
import gc
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalina.launch import free_port

FIELDS: dict[str, Any] = {
    **{"vocab_size": 8192, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    **{"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 384, "intermediate_size": 1536},
    **{"norm_topk_prob": True, "max_position_embeddings": 2048, "tie_word_embeddings": False},
}
SMALL_MB, LARGE_MB = 100, 400  # of a shard
LAYOUTS = {1: [], 4: ["parallel.tp=2", "parallel.ep=2", "parallel.zero=1"]}
MB = 1e6


def status_bytes(key: str) -> int:
    """Of this process: VmRSS, VmHWM, RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measured(action: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds and peak bytes of an action, and what it returned."""
    gc.collect()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    begin_s = time.perf_counter()
    returned = action()
    seconds = time.perf_counter() - begin_s
    return {"seconds": seconds, "peak_bytes": status_bytes("VmHWM") - before}, returned


def write(folder: Path, fields: dict[str, Any], shard_mb: int) -> None:
    """With transformers; random weights."""
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen3_moe", **fields), dtype=torch.bfloat16
    )
    model.save_pretrained(folder, max_shard_size=f"{shard_mb}MB")


def take(folder: Path, target: Path) -> dict[str, Any]:
    from megalina.checkpoint.hugging_face.importing import import_folder
    from megalina.checkpoint.stored import Stored

    found, done = measured(lambda: import_folder(folder, target, progress=False))
    stored = Stored(target)
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return found | {
        "parameters": done.parameters,
        "num_bytes": done.num_bytes,
        "shards": len(shards),
        "largest_shard_bytes": max(shards),
        "largest_tensor_bytes": max(map(stored.num_bytes, stored.listing)),
        "overrides": done.overrides,
    }


def opened(checkpoint: Path) -> dict[str, Any]:
    """As `megalina.open_checkpoint` does it, for evaluation: weights alone."""
    from megalina.checkpoint.loaded_model import load_model
    from megalina.checkpoint.stored import Stored  # imports, which are no memory of the load

    assert Stored(checkpoint).listing
    found, loaded = measured(lambda: load_model(checkpoint, dtype=torch.bfloat16))
    return found | {"weight_bytes": sum(p.nbytes for p in loaded.gpt.parameters())}


def transformers_loads(folder: Path) -> dict[str, Any]:
    import transformers

    transformers.logging.disable_progress_bar()
    found, model = measured(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    )
    return found | {"weight_bytes": sum(p.nbytes for p in model.parameters())}


def rank_loads(rank: int, world: int, port: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What `train.init_from` does in a run, up to the first step."""
    from megalina.compose import compose
    from megalina.data.source import open_data
    from megalina.train.trainer import Trainer

    torch.set_num_threads(1)
    logging.disable()
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=300))
    config = compose(overrides)
    data = open_data(config.data, seq_len=config.train.seq_len, seed=0)
    before = status_bytes("VmRSS")
    trainer = Trainer(config, data, device=torch.device("cpu"), tracker=None)
    own = sum(p.nbytes for p in trainer.built.trainable.gpt.parameters())
    built = status_bytes("VmRSS") - before
    if world > 1:
        dist.barrier()
    found, _ = measured(lambda: trainer.begin(None))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    after = status_bytes("VmRSS") - before
    return found | {"weight_bytes": own, "built_bytes": built, "after_bytes": after}


def run_in_process(file: Path, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Its result, as JSON, into `file`."""
    torch.set_num_threads(1)
    file.write_text(json.dumps(function(*arguments)))


def in_processes(scratch: Path, *jobs: tuple[Callable[..., Any], Sequence[Any]]) -> list[Any]:
    """The results of functions, each in a new process of its own, all at once."""
    context = get_context("spawn")
    files = [scratch / f"result.{i}.json" for i in range(len(jobs))]
    started = [context.Process(target=run_in_process, args=(file, *job)) for file, job in zip(files, jobs, strict=True)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if failed := [process.exitcode for process in started if process.exitcode]:
        raise SystemExit(f"a process failed with exit code {failed[0]}")
    return [json.loads(file.read_text()) for file in files]


def run(scratch: Path, *, layers: int, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    """All figures, in seconds and bytes."""
    from megalina.data.indexed import IndexedWriter

    whole = FIELDS | (fields or {})
    imports: dict[str, Any] = {}
    for name, depth, shard_mb in (
        ("checkpoint", layers, SMALL_MB),
        ("large shards", layers, LARGE_MB),
        ("half as many layers", layers // 2, SMALL_MB),
    ):
        folder = scratch / f"hf {name}"
        in_processes(scratch, (write, (folder, whole | {"num_hidden_layers": depth}, shard_mb)))
        (imports[name],) = in_processes(scratch, (take, (folder, scratch / name.replace(" ", "_"))))
    with IndexedWriter(scratch / "tokens", np.uint16) as writer:
        for _ in range(20):  # enough for every part of the split
            writer.add_document(np.arange(whole["vocab_size"], dtype=np.uint16))
    (scratch / "run").mkdir()
    loads: dict[str, list[Any]] = {}
    for world, layout in LAYOUTS.items():
        overrides = [
            *(*imports["checkpoint"]["overrides"], *layout, f"launch.ranks={world}", f"train.init_from={scratch}/checkpoint"),
            *("data=indexed", f"data.prefix={scratch}/tokens", f"data.cache_dir={scratch}/cache", f"run.dir={scratch}/run"),
            *("train.dtype=bfloat16", "train.global_batch_size=4", "train.micro_batch_size=1"),
        ]
        port = free_port()
        loads[f"{world}"] = in_processes(scratch, *((rank_loads, (rank, world, port, overrides)) for rank in range(world)))
    alone = {
        "megalina.open_checkpoint": in_processes(scratch, (opened, (scratch / "checkpoint",)))[0],
        "transformers": in_processes(scratch, (transformers_loads, (scratch / "hf checkpoint",)))[0],
    }
    return {"imports": imports, "loads": loads, "weights_alone": alone}


def table(found: dict[str, Any]) -> str:
    first = found["imports"]["checkpoint"]
    lines = [f"{first['parameters']:,} parameters, {first['num_bytes'] / MB:,.0f} MB", ""]
    lines.append(f"{'import':26}{'s':>8}{'peak MB':>10}{'shard MB':>10}{'tensor MB':>11}{'of all':>8}")
    for name, one in found["imports"].items():
        shown = (one["peak_bytes"], one["largest_shard_bytes"], one["largest_tensor_bytes"])
        peak, shard, tensor = (size / MB for size in shown)
        title = "small shards" if name == "checkpoint" else name
        lines.append(
            f"{title:26}{one['seconds']:8.1f}{peak:10.0f}{shard:10.0f}{tensor:11.0f}{one['peak_bytes'] / one['num_bytes']:8.0%}"
        )
    lines += ["", f"{'train.init_from':26}{'s':>8}{'peak MB':>10}{'weights MB':>12}{'before MB':>11}{'after MB':>10}"]
    for world, ranks in found["loads"].items():
        for rank, one in enumerate(ranks):
            title = "one process" if world == "1" else f"tp=2 ep=2, rank {rank}"
            before, after, own = (one[key] / MB for key in ("built_bytes", "after_bytes", "weight_bytes"))
            lines.append(f"{title:26}{one['seconds']:8.1f}{one['peak_bytes'] / MB:10.0f}{own:12.0f}{before:11.0f}{after:10.0f}")
    lines += ["", f"{'weights alone':26}{'s':>8}{'peak MB':>10}{'weights MB':>12}"]
    for name, one in found["weights_alone"].items():
        lines.append(f"{name:26}{one['seconds']:8.1f}{one['peak_bytes'] / MB:10.0f}{one['weight_bytes'] / MB:12.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default 8)")
    parser.add_argument("--scratch", type=Path, help="where 3 GB are written for a while (default: the system's folder)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.scratch, prefix="megalina-import-"))
    try:
        found = run(folder, layers=options.layers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    from megalina.console import command

    command(main)
