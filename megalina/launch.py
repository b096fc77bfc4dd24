"""The local ranks of a job: plain subprocesses that start together, end together and leave nothing behind.

Under torchrun or Slurm the ranks are there already; `joined` says which one this process is.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megalina import rank_process
from megalina.failure_report import RankFailed, blame
from megalina.rank_files import files_of
from megalina.rank_process import GRACE_S

POLL_S = 0.05


class Stopped(RuntimeError):
    """The job was asked to stop by a signal, and did."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@dataclass(frozen=True, slots=True)
class Member:
    """This process among ranks that something else has started."""

    launcher: str  # torchrun | slurm
    rank: int
    world: int
    local_rank: int
    local_ranks: int
    address: str
    port: int

    def environment(self) -> dict[str, str]:
        """The variables that torchrun sets and torch.distributed reads."""
        return rank_environment(self.rank, self.world, self.local_rank, self.local_ranks, self.address, self.port)


def rank_environment(rank: int, world: int, local_rank: int, local_ranks: int, address: str, port: int) -> dict[str, str]:
    values = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_ranks,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def joined(environ: Mapping[str, str]) -> Member | None:
    """Which rank this process is under torchrun or srun; None: nobody has started ranks, we do.

    ValueError for a variable that should be a number and isn't."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world = _number(environ, "WORLD_SIZE")
        return Member(
            "torchrun",
            rank=_number(environ, "RANK"),
            world=world,
            local_rank=_number(environ, "LOCAL_RANK", 0),
            local_ranks=_number(environ, "LOCAL_WORLD_SIZE", world),
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environ, "MASTER_PORT", 29500),
        )
    if "SLURM_PROCID" in environ and _number(environ, "SLURM_NTASKS", 1) > 1:
        tasks = re.match(r"\d+", environ.get("SLURM_TASKS_PER_NODE", environ["SLURM_NTASKS"]))
        return Member(
            "slurm",
            rank=_number(environ, "SLURM_PROCID"),
            world=_number(environ, "SLURM_NTASKS"),
            local_rank=_number(environ, "SLURM_LOCALID", 0),
            local_ranks=int(tasks.group()) if tasks else 1,
            address=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_JOB_NODELIST", "127.0.0.1")),
            # Jobs that share a node must not share a port: it follows from the job's number.
            port=_number(environ, "MASTER_PORT", 20000 + _number(environ, "SLURM_JOB_ID", 0) % 20000),
        )
    return None


def _number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    """A variable that is a number, `default` where there is none; ValueError that names it."""
    text = environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ValueError(f"{name}={text} in the environment must be a whole number: set it right, or take it away")
    return int(text)


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: "gpu[003-006,9],cpu1" -> "gpu003"."""
    bracketed = re.match(r"([^,\[]*)\[(\d+)[^\]]*\]([^,]*)", nodes)
    return "".join(bracketed.groups()) if bracketed else nodes.split(",")[0]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_ranks(command: Sequence[str], *, ranks: int, logs: Path) -> None:
    """Runs `command` once a rank and returns when all have ended well.

    Rank 0 writes to our stdout and stderr, the others to logs/rank_N.log; a rank may leave its traceback beside it.
    Raises RankFailed as soon as one fails, and Stopped after SIGINT, SIGTERM or SIGHUP, which all reach the ranks as SIGTERM;
    a second signal kills them.  In every case no process is left.
    """
    logs.mkdir(parents=True, exist_ok=True)
    _sweep(logs, ranks)
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with _signals() as received:
        try:
            for rank in range(ranks):
                processes.append(_start(command, rank, ranks, port, logs))
            first = _wait(processes, received)
            if first:
                failed = first | _others(processes)
                if not received:
                    raise blame(first, failed, logs, ranks)
            if received:
                raise Stopped(received[0])
        finally:
            rank_process.kill(processes)


def run_with_restarts(
    command: Sequence[str], *, ranks: int, logs: Path, restarts: int, again: Callable[[], tuple[Sequence[str], str]]
) -> None:
    """`run_ranks`, and when a rank is lost all ranks again, at most `restarts` times; what it raises the last time.

    `again()`: the command of another start, and from where it goes on, in words.  What the ranks of a failed start have
    written is moved to logs/start_N.  A signal to stop is no reason for another start, nor are settings that were refused."""
    for start in range(1, restarts + 2):
        try:
            run_ranks(command, ranks=ranks, logs=logs)
            return
        except RankFailed as error:
            if start > restarts or not error.again:
                raise
            print(error, file=sys.stderr)
        aside = _set_aside(logs, ranks)
        command, origin = again()
        print(f"start {start + 1} of {restarts + 1}, {origin}; logs of the failed one: {aside}", file=sys.stderr, flush=True)


def _sweep(logs: Path, ranks: int) -> None:
    """Files of an earlier command would be taken for those of this one."""
    stale = [path for rank in range(ranks) for path in files_of(logs, rank)]
    for path in [*stale, *logs.glob("hang_rank_*.txt")]:
        path.unlink(missing_ok=True)


def _set_aside(logs: Path, ranks: int) -> Path:
    number = next(n for n in range(1, 10**6) if not (logs / f"start_{n}").exists())
    folder = logs / f"start_{number}"
    folder.mkdir()
    for rank in range(ranks):
        for path in files_of(logs, rank):
            if path.exists():
                path.rename(folder / path.name)
    return folder


def _start(command: Sequence[str], rank: int, ranks: int, port: int, logs: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **rank_environment(rank, ranks, rank, ranks, "127.0.0.1", port)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // ranks)))
    if Path("/sys/class/net/lo").exists():
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve on a laptop
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return rank_process.start(command, environment, None if rank == 0 else logs / f"rank_{rank}.log")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the numbers of the signals that ask us to stop."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores SIGHUP
    for number in caught:
        signal.signal(number, lambda signum, _: received.append(signum))
    try:
        yield received
    finally:
        for number in caught:
            signal.signal(number, before[number])


def _wait(processes: "Sequence[subprocess.Popen[bytes]]", received: Sequence[int]) -> dict[int, int]:
    """Until all have ended, one has failed or a second signal came: {rank: exit code} of those that failed."""
    forwarded = False
    while len(received) < 2:
        codes = [process.poll() for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed or None not in codes:
            return failed
        if received and not forwarded:
            print(f"{signal.Signals(received[0]).name}: the ranks finish their step and save; once more to kill", file=sys.stderr)
            for process in processes:
                process.send_signal(signal.SIGTERM)
            forwarded = True
        time.sleep(POLL_S)
    return {}


def _others(processes: "Sequence[subprocess.Popen[bytes]]") -> dict[int, int]:
    """Waits a little, as the others notice that one is gone: {rank: exit code} of those that failed as well.

    They get no signal: it could cut short the one that is about to say what went wrong first.
    """
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    return {rank: code for rank, code in codes.items() if code}


def free_port() -> int:
    """A port on which nobody listens, for a store that is there some seconds later.

    Below the range from which systems take ports for outgoing connections (Linux: from 32768): one from there could be taken
    before the ranks have started."""
    choice = random.SystemRandom()
    for _ in range(100):
        port = choice.randrange(10_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 10000 and 32000 on 127.0.0.1")


def later_starts(checkpoints: Path, resume: str) -> Callable[[], tuple[str, str]]:
    """Called before the first start.  The function it returns gives what train.resume is in the next one, when a rank of the
    last one was lost, and says so.

    It is this job's newest checkpoint.  The settings of the first start may say something else (train.resume=PATH,
    train.init_from), and the folder may hold older checkpoints, of higher steps even, from before it.

    `checkpoints`: RUN/checkpoints.  `resume`: train.resume of the first start."""
    before = _folders(checkpoints)

    def next_start() -> tuple[str, str]:
        from megalina.checkpoint.files import is_complete  # seconds, which a job that loses no rank need not wait for

        there = _folders(checkpoints)
        complete = [path for path in there if is_complete(path)]
        own = [path for path in complete if before.get(path) != there[path]]
        if resume in ("auto", "verify", "none") or (own and max(complete) == max(own)):
            # Among damaged checkpoints it finds the one to take.  With `none` the folder had none: all are of this job.
            return "auto", f"from checkpoint {max(complete).name}" if complete else "from the beginning, without a checkpoint"
        if own:
            return str(max(own)), f"from checkpoint {max(own).name}"
        return resume, f"from {resume} again: there is no newer checkpoint yet"

    return next_start


def _folders(checkpoints: Path) -> dict[Path, tuple[int, int]]:
    """Each step's folder and what tells it from another one of the same name."""
    found = {path: path.stat() for path in checkpoints.glob("step_*") if path.name[5:].isdigit()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}
