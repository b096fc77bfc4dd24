"""A pool: rank processes that are started once and run row after row; whatever happens, none is left.

A rank that raises, dies or takes too long makes its row fail, and the next row gets new processes.
"""

import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver, get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.mesh import Mesh, build_mesh
from megalina.verify.on_ranks import Held, record_rank, together
from megalina.verify.recording import Layout, Recording

TIME_LIMIT_S = 120.0
START_S = 120.0  # for processes to start and find each other
END_S = 5.0  # for processes that were asked to end


class RowFailed(RuntimeError):
    """A row could not be run; the message says on which rank and why, its first line in short."""


class Pool:
    """Use as a context manager.  Keeps the ranks of one world size: rows sorted by it start each size once."""

    def __init__(self, *, device: str = "cpu", time_limit_s: float = TIME_LIMIT_S):
        """`device`: cpu or cuda, one GPU a rank."""
        self._device, self._time_limit_s = device, time_limit_s
        self._team: _Team | None = None
        self._job: tuple[PretrainConfig, Layout, Sequence[Batch]] | None = None

    def record(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str = "") -> Recording:
        """Run the steps in a layout.  RowFailed where a rank raises, dies or takes too long."""
        self.start(config, layout, batches, plant)
        return self.finish()

    def start(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str = "") -> None:
        """As `record`, without waiting for the ranks."""
        assert self._job is None, "a row is running"
        if self._team is not None and self._team.world != layout.world:
            self.close()
        if self._team is None:
            self._team = _Team(layout.world, self._device, self._time_limit_s)
        self._job = config, layout, batches
        self._team.send((config, layout, list(batches), plant))

    def finish(self) -> Recording:
        """The recording of the row that was started."""
        assert self._job is not None and self._team is not None, "no row was started"
        (config, layout, batches), self._job = self._job, None
        try:
            ranks = self._team.receive(self._time_limit_s)
        except BaseException:
            self._team.kill()
            self._team = None
            raise
        return together(config, layout, batches, ranks)

    def close(self) -> None:
        """End all processes."""
        if self._team is not None:
            self._team.end()
        self._team = self._job = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self._team is not None:
            self._team.kill()
            self._team = self._job = None
        self.close()


class _Team:
    """The processes of one world size, with a pipe to each and a folder for the file through which they find each other."""

    def __init__(self, world: int, device: str, time_limit_s: float):
        self.world = world
        self._folder = tempfile.TemporaryDirectory(prefix="megalina_verify_")
        self._started = time.monotonic() + START_S
        context = _context()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, device, time_limit_s, self._folder.name, there)
            process = context.Process(target=_rank_main, args=arguments, daemon=True, name=f"verify rank {rank} of {world}")
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def send(self, job: Any) -> None:
        message = pickle.dumps(job)
        for pipe in self._pipes:
            with suppress(OSError):  # it is dead: `receive` finds out
                pipe.send_bytes(message)

    def receive(self, time_limit_s: float) -> list[dict[Any, Held]]:
        """What each rank holds; RowFailed with the first that fails."""
        deadline = max(self._started, time.monotonic()) + time_limit_s  # the first row waits for the start as well
        self._started = 0.0
        missing, held = set(range(self.world)), {}
        while missing:
            ready = wait(
                [*(self._pipes[r] for r in missing), *(self._processes[r].sentinel for r in missing)],
                max(0.0, deadline - time.monotonic()),
            )
            if not ready:
                late = ", ".join(map(str, sorted(missing)))
                raise RowFailed(f"no answer from rank {late} of {self.world} after {time_limit_s:g} s")
            for rank in sorted(missing):
                if self._pipes[rank] in ready:
                    held[rank] = self._answer(rank)
                    missing.discard(rank)
                elif self._processes[rank].sentinel in ready:
                    raise RowFailed(f"rank {rank} of {self.world} ended with exit code {self._processes[rank].exitcode}")
        return [held[rank] for rank in range(self.world)]

    def end(self) -> None:
        """Ask all to end, then kill those that did not."""
        self.send(None)
        deadline = time.monotonic() + END_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._folder.cleanup()

    def _answer(self, rank: int) -> dict[Any, Held]:
        try:
            error, held = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(END_S)
            raise RowFailed(f"rank {rank} of {self.world} ended with exit code {self._processes[rank].exitcode}") from None
        if error:
            raise RowFailed(f"rank {rank} of {self.world}: {error}")
        return {key: Held(torch.from_numpy(value), note) for key, (value, note) in held.items()}


def stop_server() -> None:
    """Wait for the end of the process that forks ranks; the next pool starts another.

    It ends by itself after this process: for programs that leave nothing behind even for a moment.  No pool may be open."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # nothing public does it


def _context() -> SpawnContext | ForkServerContext:
    """Where it can be had, one server imports torch once and forks each rank; it ends with this process."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["megalina.verify.pool", "torch._dynamo"])  # an optimizer's first step imports the second
    return context


def _rank_main(rank: int, world: int, device_name: str, time_limit_s: float, folder: str, pipe: Connection) -> None:
    """A rank's process: row after row, until told to end or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's business
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve
    device = torch.device("cuda", rank) if device_name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meshes: dict[tuple[int, int], Mesh] = {}  # communicators take longer than a row
    started = world == 1
    while (job := _next(pipe)) is not None:
        config, layout, batches, plant = job
        error, answer = "", {}
        try:
            if not started:
                _join(rank, world, device, time_limit_s, folder)
                started = True
            key = layout.tp, layout.ep
            if key not in meshes:
                meshes[key] = build_mesh(tp=layout.tp, ep=layout.ep, timeout_s=time_limit_s)
            held = record_rank(config, layout, batches, meshes[key], device=device, plant=plant)
            answer = {key: (h.value.numpy(), h.note) for key, h in held.items()}  # arrays pickle faster than tensors
        except Exception as problem:  # noqa: BLE001  the parent reports it
            error = f"{type(problem).__name__}: {problem}\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps((error, answer), protocol=pickle.HIGHEST_PROTOCOL))
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, world: int, device: torch.device, time_limit_s: float, folder: str) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",  # a port could be taken between its choice and its use
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=time_limit_s),
        device_id=device if device.type == "cuda" else None,
    )


def _next(pipe: Connection) -> Any:
    """The next job; None at the end."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return None


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the main thread may be waiting inside a collective
