"""The process of a rank, wherever it was started: it ends with us, and how it ended is put into words."""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

GRACE_S = 1.0  # after a failure the other ranks have this long to end by themselves, then they are killed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What a rank says when another one is gone: it is not the one to blame.
CONSEQUENCES = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket closed|DistNetworkError|DistBackendError|recvValue failed"
)


def start(
    command: Sequence[str], environ: Mapping[str, str], out: IO[str] | Path | None, *, cores: Sequence[int] | None = None
) -> "subprocess.Popen[bytes]":
    """`out`: where it writes to, stdout and stderr together; None: to ours.  `cores`: on which it stays; None: on any."""
    with ExitStack() as stack:
        file = stack.enter_context(open(out, "wb")) if isinstance(out, Path) else out
        return subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone; a rank's own children can be ended with it
            preexec_fn=_die_with_us(cores),
        )


def kill(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Kills what is left of every rank and of its children."""
    for process in processes:
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def how_it_ended(code: int) -> str:
    """An exit code that isn't 0, in words; below 0: a signal's number."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return f"{how} (out of memory?)" if code == -signal.SIGKILL else how


def for_own_reasons(codes: Mapping[int, int], last_words: Mapping[int, str]) -> list[int]:
    """The ranks that did not fail just because another one was gone.  `codes`: of those that failed."""
    return [rank for rank, code in codes.items() if code < 0 or not CONSEQUENCES.search(last_words[rank][-2000:])]


def _die_with_us(cores: Sequence[int] | None) -> Callable[[], None] | None:
    """For the child between fork and exec: it stays on these cores, and is killed when we end, even by SIGKILL.  Linux only.

    Linux takes the *thread* that has forked for the parent, so ranks must be started by the thread that waits for them."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, us = ctypes.CDLL(None).prctl, os.getpid()

    def arm() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != us:  # we had ended before prctl
            os._exit(1)

    return arm
