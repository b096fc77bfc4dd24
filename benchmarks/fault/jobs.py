"""The jobs of the table of faults: one run each, as starts of the public command that are watched from outside."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN, PLANTS = str(ROOT / "pretrain_gpt_moe.py"), str(Path(__file__).resolve().parent / "plants.py")
OVERRIDES = (
    *("model=tiny", "train.seq_len=32", "train.global_batch_size=8", "train.micro_batch_size=1", "train.eval_interval=0"),
    *("launch.device=cpu", "parallel.ep=2", "parallel.zero=1", "data=indexed", "tracker=minimal", "tracker.progress=none"),
    *("cluster.peak_tflops=1", "hang.timeout_s=3"),
)
MARK = "MEGALINA_FAULTS"  # in the environment of every process of a job, and of no other
FAULT_FILE = "fault_s"  # where a plant writes the time
GIVE_UP_S = 90.0
POLL_S = 0.02


class Command:
    """One start of the public command: its lines with the time at which each was there, and its processes."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._mark = f"{os.getpid()}.{time.time_ns()}"
        self.lines: list[tuple[float, str]] = []
        self.started_s = time.time()
        self.launcher = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, MARK: self._mark, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    @property
    def running(self) -> bool:
        return self.launcher.poll() is None

    def processes(self) -> dict[int, str]:
        """Every living process of this start: {number: RANK in its environment}."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    environment = dict(item.partition(b"=")[::2] for item in (folder / "environ").read_bytes().split(b"\0"))
                except OSError:  # it has just ended, or is another user's
                    continue
                if environment.get(MARK.encode()) == self._mark.encode():
                    found[int(folder.name)] = environment.get(b"RANK", b"").decode()
        return found

    def rank(self, rank: int) -> int:
        return next(number for number, its_rank in self.processes().items() if its_rank == str(rank))

    def wait(self, limit_s: float = GIVE_UP_S) -> None:
        """Until the launcher has ended, or not."""
        deadline_s = time.time() + limit_s
        while self.running and time.time() < deadline_s:
            time.sleep(POLL_S)

    def left(self, limit_s: float = 3.0) -> list[int]:
        """The processes that are still there, which have `limit_s` to go."""
        deadline_s = time.time() + limit_s
        while (left := self.processes()) and time.time() < deadline_s:
            time.sleep(POLL_S)
        return sorted(left)

    def kill_all(self) -> None:
        while left := self.processes():
            for number in left:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(POLL_S)
        self.launcher.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self.lines.append((time.time(), line.rstrip("\n")))


class Job:
    """A run with a fault."""

    def __init__(self, name: str, folder: Path, ranks: int) -> None:
        """`folder` holds the runs of all jobs and their data."""
        self.folder, self.run, self.ranks = folder, folder / name, ranks
        self.starts: list[Command] = []
        self.fault_s: float | None = None  # seconds since the epoch

    def start(self, *settings: str, plant: str = "", run: Path | None = None) -> Command:
        data = (f"data.prefix={self.folder / 'tokens'}", f"data.cache_dir={self.folder / 'cache'}")
        own = (f"run.dir={run or self.run}", f"launch.ranks={self.ranks}", *data, *OVERRIDES, *settings)
        self.starts.append(Command([PLANTS, "command", plant, *own] if plant else [PRETRAIN, *own]))
        return self.starts[-1]

    def trained(self) -> int:
        """Steps in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_until(self, command: Command, there: Callable[[], bool]) -> float:
        """When it was not yet so for the last time.  RuntimeError where the job ends before, or does not get there."""
        last_s = time.time()
        deadline_s = last_s + GIVE_UP_S
        while not there():
            last_s = time.time()
            if not command.running or last_s > deadline_s:
                raise RuntimeError(f"the job did not get far enough for its fault: {command.text[-1000:]}")
            time.sleep(POLL_S)
        return last_s

    def end_all(self) -> None:
        for command in self.starts:
            command.kill_all()

    def fault_began(self) -> float | None:
        """When, in seconds since the epoch: a plant writes it down; a fault from outside sets `fault_s`."""
        path = self.run / FAULT_FILE
        return float(path.read_text()) if path.exists() else self.fault_s
