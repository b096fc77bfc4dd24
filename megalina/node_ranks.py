"""The ranks of a command on the nodes of an emulated cluster: started together, ended together, the first failure named."""

import itertools
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from megalina.failure_report import TAIL_LINES
from megalina.launch import Stopped, rank_environment
from megalina.rank_process import GRACE_S, for_own_reasons, how_it_ended, kill, start

MASTER_PORT = 29500  # every cluster has its own ports
STOP_S = 10.0  # after a signal the ranks have this long to save, then they are killed
KILL_S = 10.0  # a process that the kernel can't kill within this time is left behind
TIMED_OUT = 124  # exit code, timeout(1)'s


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended: exit code 0 when every rank ended well, else the code of the first rank that didn't (128 + number
    for a signal, as a shell says it), or TIMED_OUT; and the reason, with the end of what that rank wrote."""

    code: int
    reason: str = ""


def run_on_nodes(
    nodes: Sequence[str],
    command: Sequence[str],
    *,
    ranks_per_node: int,
    logs: Path,
    env: Mapping[str, str],
    timeout_s: float,
    stream: IO[str] | None,
) -> Outcome:
    """Runs `command` once a rank in the namespaces `nodes`, and ends every process in them; see `Cluster.run`."""
    logs.mkdir(parents=True, exist_ok=True)
    environ = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ, **env}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for node, local in itertools.product(range(len(nodes)), range(ranks_per_node)):
            place = environment(node, local, nodes=len(nodes), ranks_per_node=ranks_per_node)
            out = stream if not ranks else logs / f"rank_{len(ranks)}.log"
            cores = cores_of(node, len(nodes), sorted(os.sched_getaffinity(0)))
            with signals_wait():  # else one could come between a rank's start and its place in the list
                ranks.append(start(["ip", "netns", "exec", nodes[node], *command], {**environ, **place}, out, cores=cores))
        failed = _failures(ranks, timeout_s)
        if not failed and any(process.returncode is None for process in ranks):
            left = [rank for rank, process in enumerate(ranks) if process.returncode is None]
            return Outcome(TIMED_OUT, f"no end after {timeout_s:g} s: rank(s) {', '.join(map(str, left))} still ran")
        return _blamed({rank: ranks[rank].returncode for rank in failed}, len(ranks), logs)
    except Stopped:
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        _failures(ranks, STOP_S, grace_s=STOP_S)
        raise
    finally:
        kill(ranks)
        kill_in(nodes)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals that ask us to stop are handled when the body is done."""
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, old in before.items():
        if callable(old):  # not SIG_IGN or SIG_DFL: nothing of ours is undone by those
            signal.signal(number, lambda signum, frame: came.append((signum, frame)))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    for came_number, frame in came:
        handler = before[signal.Signals(came_number)]
        assert callable(handler)
        handler(came_number, frame)


def address(node: int) -> str:
    return f"10.0.0.{node + 1}"


def environment(node: int, local: int, *, nodes: int, ranks_per_node: int) -> dict[str, str]:
    """torchrun's variables for rank `local` of a node, and gloo's way to the others."""
    rank, world = node * ranks_per_node + local, nodes * ranks_per_node
    return {
        **rank_environment(rank, world, local, ranks_per_node, address(0), MASTER_PORT),
        "NODE_RANK": str(node),
        "GROUP_RANK": str(node),
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def cores_of(node: int, nodes: int, cores: Sequence[int]) -> Sequence[int]:
    """The cores on which a node's ranks stay: their own where there are enough, else one that nodes take in turn.

    Left to itself the kernel moves ranks to and fro, and each time they find another core's caches."""
    share = len(cores) // nodes
    return cores[node * share : (node + 1) * share] if share else [cores[node % len(cores)]]


def check_command(command: Sequence[str]) -> None:
    """ValueError for a command that can't be started."""
    if not command:
        raise ValueError("there is no command")
    if shutil.which(command[0]) is None:
        raise ValueError(f"there is no command {command[0]}")


def kill_in(names: Iterable[str]) -> None:
    """Kills the processes of namespaces until none is left: one may start another meanwhile, and dying takes time."""
    deadline = time.monotonic() + KILL_S
    for name in names:
        while (pids := call(["ip", "netns", "pids", name]).stdout.split()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)


def call(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """A command that is soon done, out of reach of a terminal's Ctrl-C."""
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


def _failures(ranks: "Sequence[subprocess.Popen[bytes]]", timeout_s: float, grace_s: float = GRACE_S) -> list[int]:
    """Waits until all have ended, or for `timeout_s`, but only `grace_s` longer after the first failure: those that failed,
    in the order of their ends.

    The others get no signal: it could cut short the one that is about to say what went wrong first."""
    failed: list[int] = []
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        poll, running = select.poll(), {}
        for rank, process in enumerate(ranks):
            if process.returncode is not None:
                continue
            fd = os.pidfd_open(process.pid)
            stack.callback(os.close, fd)
            running[fd] = rank
            poll.register(fd, select.POLLIN)
        while running and (left_s := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(min(left_s, 3600) * 1000):
                poll.unregister(fd)
                rank = running.pop(fd)
                if ranks[rank].wait():
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + grace_s)
    return failed


def _blamed(codes: Mapping[int, int], world: int, logs: Path) -> Outcome:
    """Who failed first for a reason of its own, and who else did.  `codes`: of failed ranks, in the order of their ends."""
    if not codes:
        return Outcome(0)
    # What rank 0 wrote is on the user's screen.
    tails = {r: (logs / f"rank_{r}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:] if r else [] for r in codes}
    own = for_own_reasons(codes, {rank: "\n".join(lines) for rank, lines in tails.items()})
    shown = (own or list(codes))[:2]
    lines = []
    for rank in shown:
        lines += [f"rank {rank} of {world} {how_it_ended(codes[rank])}", *(f"[rank {rank}] {line}" for line in tails[rank])]
    code = codes[shown[0]]
    return Outcome(code if code > 0 else 128 - code, "\n".join(lines))
