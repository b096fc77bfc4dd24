"""One rank of a measurement: python -m megalina.measure.worker SPEC, with torchrun's variables."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.console import StatusLine
from megalina.launch import num_cores
from megalina.measure.check import trial_run
from megalina.measure.collectives import collective_s, contention, groups_of
from megalina.measure.figures import Measured
from megalina.measure.host_time import of_all_ranks
from megalina.measure.kernels import TINY_OPS, TinyStep, kernel_calls, tiny_step
from megalina.measure.shapes import Sizes, sent_key, sizes_of
from megalina.measure.stopwatch import Stopwatch
from megalina.mesh import Mesh, all_gather_object, build_mesh
from megalina.perfmodel.sim.collectives import Collective
from megalina.worker import load_config

PASSES = 2
TIMEOUT_S = 600.0
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}  # the first one is what models there are trained in


def main(spec_path: str) -> int:
    run(json.loads(Path(spec_path).read_text()))
    return 0


def run(spec: Mapping[str, Any]) -> None:
    """`spec`: what ("measure", "check" or "host"), device (cpu | cuda), seconds (of each thing that is timed), out (JSON, which
    rank 0 writes); of a check, and of the host's time, configs {name: YAML} and steps."""
    device = device_of(spec["device"])
    step = tiny_step(device) if spec["what"] == "measure" else None  # before there is a process group
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=TIMEOUT_S),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        mesh = build_mesh()
        if step is not None:
            found: dict[str, Any] = asdict(measure(mesh, device, step, seconds=spec["seconds"]))
        else:
            configs = {name: load_config(text) for name, text in spec["configs"].items()}
            one = trial_run if spec["what"] == "check" else of_all_ranks
            found = {name: one(config, device, steps=spec["steps"]) for name, config in configs.items()}
        if mesh.world.rank == 0:
            Path(spec["out"]).write_text(json.dumps(found, allow_nan=False))
    finally:
        dist.destroy_process_group()


def device_of(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def measure(mesh: Mesh, device: torch.device, step: TinyStep, *, seconds: float) -> Measured:
    """Everything twice; the same on every rank.  All call it together."""
    load = os.getloadavg()[0]
    world, ranks_per_node = mesh.world.size, int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world.size))
    threads_a_core = ranks_per_node * torch.get_num_threads() / num_cores()
    sizes, watch = sizes_of(device.type), Stopwatch(device, seconds=seconds, threads_a_core=threads_a_core)
    groups = groups_of(world=world, ranks_per_node=ranks_per_node)
    together = build_mesh(ep=world)
    progress = Progress(mesh.world.rank == 0)
    passes = []
    for number in range(PASSES):
        progress.heading = f"pass {number + 1} of {PASSES}"
        found = kernel_seconds(mesh, sizes, device, step, watch, progress)
        passes.append(found | sent_seconds(groups, sizes, device, progress))
    progress.say("contention")
    contended = contention(together, device) if world > 1 else {}
    everybody = all_gather_object(mesh, (watch.core_share, load))
    progress.end()
    return Measured(
        kind=device.type,
        device=name_of(device),
        torch=torch.__version__,
        nodes=world // ranks_per_node,
        ranks_per_node=ranks_per_node,
        threads=torch.get_num_threads(),
        memory_gib=memory_gib(device, ranks_per_node),
        dtypes=DTYPES[device.type],
        instructions=step.instructions,
        instruction_kernels=step.kernels,
        tiny_ops=TINY_OPS,
        passes=tuple(passes),
        contention=contended,
        core_share=min(1.0, min(share for share, _ in everybody) * max(1.0, threads_a_core)) if device.type == "cpu" else 1.0,
        load=max(load for _, load in everybody),
    )


class Progress:
    """One line on stderr, of rank 0."""

    def __init__(self, shown: bool):
        self._shown, self.heading, self._line = shown, "", StatusLine()
        self._began_s = time.monotonic()

    def say(self, what: str) -> None:
        if self._shown:
            self._line.show(f"{self.heading}, {time.monotonic() - self._began_s:.0f} s: {what}")

    def end(self) -> None:
        self._line.end()


def kernel_seconds(
    mesh: Mesh, sizes: Sizes, device: torch.device, step: TinyStep, watch: Stopwatch, progress: Progress
) -> dict[str, float]:
    """Of each call, on the slowest rank; all ranks compute the same at the same time, as cores share caches, memory and heat."""
    own = {}
    makers = kernel_calls(sizes, DTYPES[device.type], device) | {"tiny step": lambda: step.run}
    for key, make in makers.items():
        progress.say(key)
        call = make()
        all_gather_object(mesh, None)  # all begin together
        own[key] = watch.median_s(call)
    everybody = all_gather_object(mesh, own)
    return {key: max(of[key] for of in everybody) for key in own}


def sent_seconds(
    groups: Mapping[str, tuple[Mesh, str]], sizes: Sizes, device: torch.device, progress: Progress
) -> dict[str, float]:
    out = {}
    for where, (mesh, axis) in groups.items():
        for op in Collective:
            for num_bytes in sizes.sent_bytes:
                key = sent_key(where, op.value, num_bytes)
                progress.say(key)
                out[key] = collective_s(op, num_bytes, mesh, axis, device)
    return out


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor() or platform.machine()


def memory_gib(device: torch.device, ranks_per_node: int) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / ranks_per_node


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
