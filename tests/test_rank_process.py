"""A rank's process and what is said of its end; whole jobs are in test_launch.py and test_namespaces.py."""

import signal
import sys
import time
from pathlib import Path

from megalina import rank_process


def test_an_end_is_told_in_words() -> None:
    assert rank_process.how_it_ended(3) == "failed with exit code 3"
    assert rank_process.how_it_ended(-signal.SIGTERM) == "was ended by SIGTERM"
    assert rank_process.how_it_ended(-signal.SIGKILL) == "was ended by SIGKILL (out of memory?)"


def test_who_only_lost_another_rank_is_not_to_blame() -> None:
    words = {0: "RuntimeError: Connection closed by peer [127.0.0.1]", 1: "ZeroDivisionError", 2: "Broken pipe"}
    assert rank_process.for_own_reasons({0: 1, 1: 1, 2: -signal.SIGKILL}, words) == [1, 2]
    assert rank_process.for_own_reasons({0: 1}, words) == []


def test_a_rank_and_its_children_are_killed(tmp_path: Path) -> None:
    script = "import os, subprocess; p = subprocess.Popen(['sleep', '60']); print(os.getpgid(p.pid), flush=True); p.wait()"
    ranks = [rank_process.start([sys.executable, "-c", script], {}, tmp_path / f"{rank}", cores=[0]) for rank in range(2)]
    while not all((tmp_path / f"{rank}").read_text().endswith("\n") for rank in range(2)):
        assert all(rank.poll() is None for rank in ranks)
    rank_process.kill(ranks)
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2
    groups = {(tmp_path / f"{rank}").read_text().strip() for rank in range(2)}
    deadline = time.monotonic() + 20
    while left := [p for p in Path("/proc").glob("[0-9]*/stat") if _group(p) in groups]:  # dying takes time
        assert time.monotonic() < deadline, left


def _group(stat: Path) -> str:
    """Of a process that lives; a zombie has ended."""
    try:
        words = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] in "ZX" else words[2]
