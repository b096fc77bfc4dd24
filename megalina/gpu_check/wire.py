"""The wire on one GPU: which collectives gloo carries for two ranks, and NCCL for one, on streams of two priorities."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megalina.gpu_check.found import FAILED, OK, Found


def collectives(device: str, folder: Path) -> Found:
    """Two ranks on one GPU by gloo: which collectives it carries for such tensors, each against its result by hand.  NCCL wants a
    GPU for each rank, so it is tried with one, on streams of two priorities."""
    out = folder / "collectives.parts"
    out.mkdir(exist_ok=True)
    mp.spawn(_gloo_rank, (device, str(out)), nprocs=2)
    first, second = (json.loads((out / f"gloo_{rank}.json").read_text()) for rank in range(2))
    by_name = {
        name: said if said == second[name] else f"wrong: {said} on rank 0, {second[name]} on rank 1"
        for name, said in first.items()
    }
    wrong = [f"{name} by gloo: {said}" for name, said in by_name.items() if said.startswith("wrong")]
    lines = [f"gloo, 2 ranks, {device} tensors: " + ", ".join(f"{name} {said}" for name, said in by_name.items())]
    numbers: dict[str, Any] = {"gloo": by_name}
    if device == "cuda":
        mp.spawn(_nccl_rank, (str(out),), nprocs=1)
        numbers["nccl"] = json.loads((out / "nccl.json").read_text())
        lines.append(f"NCCL, 1 rank: {numbers['nccl']['said']}")
        wrong += [] if numbers["nccl"]["right"] else [f"NCCL: {numbers['nccl']['said']}"]
    return Found(FAILED if wrong else OK, why="; ".join(wrong), numbers=numbers, lines=lines)


def _gloo_rank(rank: int, device: str, out: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{out}/store", 2), rank=rank, world_size=2)
    own = torch.arange(4.0, device=device) + 10 * rank
    both = [torch.arange(4.0, device=device) + 10 * r for r in range(2)]

    def all_reduce() -> tuple[Any, Any]:
        value = own.clone()
        dist.all_reduce(value)
        return value, both[0] + both[1]

    def all_gather() -> tuple[Any, Any]:
        value = torch.empty(8, device=device)
        dist.all_gather_into_tensor(value, own)
        return value, torch.cat(both)

    def all_to_all() -> tuple[Any, Any]:
        value = torch.empty(4, device=device)
        dist.all_to_all_single(value, own)
        return value, torch.cat([b[2 * rank : 2 * rank + 2] for b in both])

    def reduce_scatter() -> tuple[Any, Any]:
        value = torch.empty(2, device=device)
        dist.reduce_scatter_tensor(value, own)
        return value, (both[0] + both[1])[2 * rank : 2 * rank + 2]

    said = {}
    for collective in (all_reduce, all_gather, all_to_all, reduce_scatter):
        try:
            found, wanted = collective()
            said[collective.__name__] = "right" if torch.equal(found, wanted) else f"wrong: {found.tolist()}"
        except (RuntimeError, ValueError, NotImplementedError) as error:  # what gloo says of tensors that it doesn't carry
            said[collective.__name__] = f"refused ({str(error).splitlines()[0][:90]})"
    Path(out, f"gloo_{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _nccl_rank(rank: int, out: str) -> None:
    torch.cuda.set_device(0)
    where = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.FileStore(f"{out}/nccl_store", 1), rank=0, world_size=1, device_id=where)
    first, last = torch.cuda.Stream.priority_range()[::-1]  # type: ignore[call-arg]  # the stub lacks "static"
    streams = [torch.cuda.Stream(priority=p) for p in (first, last)]
    values = []
    for stream in streams:
        with torch.cuda.stream(stream):
            value = torch.ones(1 << 20, device=where)
            dist.all_reduce(value, async_op=True).wait()
            got = torch.empty_like(value)
            dist.all_to_all_single(got, value, async_op=True).wait()
            values.append(got)
    torch.cuda.synchronize()
    right = all(bool((v == 1).all()) for v in values)
    said = f"all-reduce and all-to-all on streams of priority {first} and {last}: {'right' if right else 'wrong'}"
    Path(out, "nccl.json").write_text(json.dumps({"right": right, "said": said}))
    dist.destroy_process_group()
