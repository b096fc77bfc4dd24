"""Forked ranks: the launcher's ranks as forks of the server that forks all ranks of tests, so that a start costs milliseconds.

Everything but the start is the launcher's own: a rank is a session of its own, its exit code and output are seen by it."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megalina import launch
from megalina.failure_report import RankFailed
from megalina.rank_pool import fork
from tests.parallel.ranks import PRELOAD

TERMINAL = "terminal.txt"  # what the launcher's stderr would show of rank 0


class ForkedRank:
    """As much of subprocess.Popen as the launcher uses."""

    def __init__(self, work: Callable[..., int], rank: int, environment: dict[str, str], output: Path, arguments: Sequence[Any]):
        self._process = fork(_rank, work, rank, environment, output, arguments, name=f"rank {rank}", preload=PRELOAD)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _rank(work: Callable[..., int], rank: int, environment: dict[str, str], output: Path, arguments: Sequence[Any]) -> None:
    os.setsid()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = work(rank, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Outcome:
    """How a job ended."""

    error: str  # the launcher's last word; empty: all went well
    text: str  # all that a person sees on stderr
    seconds: float


def run_job(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run_dir: Path,
    work: Callable[..., int],
    *arguments: Any,
    restarts: int = 0,
    again: Callable[[], tuple[Sequence[str], str]] = lambda: ([], ""),
) -> Outcome:
    """`work(rank, command, *arguments)` on each of two ranks under the launcher, which starts them again with the command
    that `again` gives.  No process may be left."""
    terminal, pids = run_dir / TERMINAL, []
    terminal.unlink(missing_ok=True)

    def start(command: Sequence[str], rank: int, ranks: int, port: int, logs: Path) -> ForkedRank:
        environment = launch.rank_environment(rank, ranks, rank, ranks, "127.0.0.1", port) | {"GLOO_SOCKET_IFNAME": "lo"}
        output = terminal if rank == 0 else logs / f"rank_{rank}.log"
        process = ForkedRank(work, rank, environment, output, (list(command), *arguments))
        pids.append(process.pid)
        return process

    monkeypatch.setattr(launch, "_start", start)
    started_s = time.monotonic()
    try:
        launch.run_with_restarts([], ranks=2, logs=run_dir / "logs", restarts=restarts, again=again)
        error = ""
    except RankFailed as failed:
        error = str(failed)
    seconds = time.monotonic() - started_s
    assert not [pid for pid in pids if _exists(pid)], "a process is left"
    rank_0 = terminal.read_text() if terminal.exists() else ""
    return Outcome(error, rank_0 + capsys.readouterr().err + error, seconds)


def _exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True
