"""Ranks for tests: N gloo processes that run a list of jobs and hand back what each gave, then end."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megalina.launch import free_port


def run_on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(*arguments)` on each rank; their results in order.  RuntimeError with the traceback of the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        died: Exception | None = None
        try:
            mp.spawn(_rank, (world, port, folder, work, arguments), nprocs=world)  # ends the others when one fails
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            died = error
        files = {rank: Path(folder) / str(rank) for rank in range(world)}
        results = {rank: pickle.loads(file.read_bytes()) for rank, file in files.items() if file.exists()}
    for rank, (ok, value) in results.items():
        if not ok:
            raise RuntimeError(f"rank {rank} of {world}:\n{value}")
    if died is not None:
        raise died
    return [value for _, value in results.values()]


def _rank(rank: int, world: int, port: int, folder: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        result = True, work(*arguments)
    except Exception:  # noqa: BLE001  the parent raises it
        result = False, traceback.format_exc()
    whole = Path(folder) / f"{rank}.partial"  # renamed when whole: the parent may end this rank while it writes
    whole.write_bytes(pickle.dumps(result))
    whole.rename(Path(folder) / str(rank))
    if result[0]:
        dist.barrier()
        dist.destroy_process_group()
    else:
        os._exit(1)  # the others may be waiting for this rank
