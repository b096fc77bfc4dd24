"""A pool of ranks: processes that meet in a process group and do job after job, and of which none is left whatever happens.

They are forked from one server that has imported torch once, so that a start costs milliseconds in place of seconds.  A rank
is as a process that was started anew: the environment and folder of this one, random numbers of its own, one thread, a process
group of its own.  One thing is shared: all have the server's seed of string hashes, so that sets of strings have one order on
all ranks, which is not so where a launcher starts them.
"""

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver, get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

TIME_LIMIT_S = 120.0  # of a job
START_S = 120.0  # for processes to start and find each other
END_S = 20.0  # for processes that were asked to end
DEATH_S = 0.5  # for the death of a rank to be seen after another rank has missed it
COLLECTIVE_S = 60.0  # a collective of all ranks; axes of a mesh have their own limits
LOOPBACK = "127.0.0.1"
BACKWARD = "torch.fx.experimental.symbolic_shapes"  # torch's first backward imports it, and sympy with it: a second of each rank
FOR_ALL = (BACKWARD,)  # what the server imports, whichever pool is the first to need it


class RanksFailed(RuntimeError):
    """A job came to no end; the message says on which rank and why, its first line in short."""


class RankPool:
    """Use as a context manager.  Ranks stay from job to job of one world size; a job that fails takes them along."""

    def __init__(self, *, device: str = "cpu", time_limit_s: float = TIME_LIMIT_S, preload: Sequence[str] = ()):
        """`device`: cpu or cuda, one GPU a rank.  `preload`: modules that the server imports before it forks, if this pool is
        the first to need it."""
        self._device, self._time_limit_s, self._preload = device, time_limit_s, preload
        self._team: _Team | None = None
        self._running = False

    @property
    def pids(self) -> list[int]:
        """Of all ranks, in order."""
        return [] if self._team is None else [process.pid for process in self._team.processes if process.pid is not None]

    def run(self, world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`work(*arguments)` on each rank; their results in order.

        RanksFailed where a rank raises, with its traceback, and where one dies or takes too long."""
        self.start(world, work, *arguments)
        return self.finish()

    def start(self, world: int, work: Callable[..., Any], *arguments: Any) -> None:
        """As `run`, without waiting for the ranks.  `work` is found by its name in its module."""
        assert not self._running, "a job is running"
        job = pickle.dumps((work, arguments))
        if self._team is not None and self._team.world != world:
            self.close()
        if self._team is None:
            self._team = _Team(world, self._device, self._preload)
        self._team.send(job)
        self._running = True

    def finish(self) -> list[Any]:
        """The results of the job that was started."""
        assert self._running and self._team is not None, "no job was started"
        self._running = False
        try:
            return self._team.receive(self._time_limit_s)
        except BaseException:
            self.kill()
            raise

    def close(self) -> list[str]:
        """End all ranks.  A line for each that did not end well by itself."""
        said = [] if self._team is None else self._team.end()
        self._team, self._running = None, False
        return said

    def kill(self) -> None:
        """End all ranks at once."""
        if self._team is not None:
            self._team.kill()
        self._team, self._running = None, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.kill()
        self.close()


def fork(work: Callable[..., Any], *arguments: Any, name: str, preload: Sequence[str] = ()) -> ForkServerProcess | SpawnProcess:
    """A process that runs `work(*arguments)`, which has begun."""
    process = _context(preload).Process(target=_forked, args=(dict(os.environ), work, arguments), daemon=True, name=name)
    process.start()
    return process


def stop_server() -> None:
    """Wait for the end of the process that forks ranks; the next one that needs it starts another.

    It ends by itself after this process: for programs that leave nothing behind even for a moment.  No pool may be open."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # nothing public does it


class _Team:
    """The processes of one world size, with a pipe to each and a folder for the file through which they find each other."""

    def __init__(self, world: int, device: str, preload: Sequence[str]):
        self.world = world
        self.processes: list[ForkServerProcess | SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megalina_ranks_")
        self._started = time.monotonic() + START_S
        try:
            for rank in range(world):
                here, there = _context(preload).Pipe()
                self._pipes.append(here)
                name = f"rank {rank} of {world}"
                self.processes.append(fork(_rank_main, rank, world, device, self._folder.name, there, name=name, preload=preload))
                there.close()
        except BaseException:
            self.kill()
            raise

    def send(self, job: bytes) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it is dead: `receive` finds out
                pipe.send_bytes(job)

    def receive(self, time_limit_s: float) -> list[Any]:
        """Each rank's result; RanksFailed with the first that fails."""
        deadline = max(self._started, time.monotonic()) + time_limit_s  # the first job waits for the start as well
        self._started = 0.0
        missing, results = set(range(self.world)), {}
        while missing:
            ready = wait(
                [*(self._pipes[r] for r in missing), *(self.processes[r].sentinel for r in missing)],
                max(0.0, deadline - time.monotonic()),
            )
            if not ready:
                late = ", ".join(map(str, sorted(missing)))
                raise RanksFailed(f"no answer from rank {late} of {self.world} after {time_limit_s:g} s")
            for rank in sorted(missing):
                if self._pipes[rank] in ready:
                    results[rank] = self._answer(rank)
                    missing.discard(rank)
                elif self.processes[rank].sentinel in ready:
                    raise RanksFailed(self._ending(rank))
        return [results[rank] for rank in range(self.world)]

    def end(self) -> list[str]:
        """Ask all to end, then kill those that did not.  A line for each that did not end well."""
        self.send(b"")
        deadline = time.monotonic() + END_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        said = [self._ending(rank) for rank, process in enumerate(self.processes) if process.exitcode != 0]
        self.kill()
        return said

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self.processes, self._pipes = [], []
        self._folder.cleanup()

    def _answer(self, rank: int) -> Any:
        try:
            error, result = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self.processes[rank].join(END_S)
            raise RanksFailed(self._ending(rank)) from None
        if error:
            wait([process.sentinel for process in self.processes], DEATH_S)
            for other, process in enumerate(self.processes):
                if process.exitcode is not None:  # what this rank complains of may be that one's death
                    raise RanksFailed(f"{self._ending(other)}; rank {rank}: {error}")
            raise RanksFailed(f"rank {rank} of {self.world}: {error}")
        return result

    def _ending(self, rank: int) -> str:
        code = self.processes[rank].exitcode
        if code is None:
            how = "does not end"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return f"rank {rank} of {self.world} {how}"


def _context(preload: Sequence[str]) -> ForkServerContext | SpawnContext:
    """Where it can be had, that of a running server; the server ends with this process."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *FOR_ALL, *preload])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11's server does not look where this process does
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _forked(environment: dict[str, str], work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """What all would have from the server is put right: its environment, and seeds (Python's own sees to itself)."""
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()
    torch.seed()
    torch.set_num_threads(1)
    work(*arguments)


def _rank_main(rank: int, world: int, device_name: str, folder: str, pipe: Connection) -> None:
    """A rank's process: job after job, until told to end or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's business
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve
    while job := _next(pipe):
        try:
            if not dist.is_initialized():
                _join(rank, world, device_name, folder)
            work, arguments = pickle.loads(job)
            answer = pickle.dumps(("", work(*arguments)), protocol=pickle.HIGHEST_PROTOCOL)
        except SystemExit:
            raise
        except BaseException as problem:  # noqa: BLE001  the parent reports it; pytest's own failures are no Exceptions
            answer = pickle.dumps((f"{type(problem).__name__}: {problem}\n{traceback.format_exc()}", None))
        pipe.send_bytes(answer)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, world: int, device_name: str, folder: str) -> None:
    """Meet at a store as under a launcher.  Rank 0 chooses the port: one chosen before could be taken meanwhile."""
    device = torch.device("cuda", rank) if device_name == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=COLLECTIVE_S)
    notes = dist.FileStore(f"{folder}/port", world)
    if rank == 0:
        store = dist.TCPStore(LOOPBACK, 0, world, is_master=True, wait_for_workers=False, timeout=timeout)
        notes.set("port", str(store.port))
    else:
        store = dist.TCPStore(LOOPBACK, int(notes.get("port")), world, is_master=False, timeout=timeout)
    values = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": store.port, "RANK": rank, "WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in values.items()}
    backend = "gloo" if device is None else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)


def _next(pipe: Connection) -> bytes:
    """The next job; empty at the end."""
    try:
        return pipe.recv_bytes()
    except (EOFError, OSError):
        return b""


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the main thread may be waiting inside a collective
