"""A table of faults: what a job says and does about each, how soon, and what is left of it.

    python benchmarks/faults.py --json faults.json                  all, some minutes on 2 cores
    python benchmarks/faults.py --only kill_rank swap_buckets       --list: their names

Each fault meets a real job of the public command: a small model on 2 or 4 ranks (ep=2, ZeRO-1), hang.timeout_s=3.  Signals and
damage come from outside, to the command as it is; what can't come from outside is planted in the ranks (fault_plants.py).

"message" is the time from the fault to the last line that its explanation must have, "end" to the end of the last process of the
job.  A damaged checkpoint is met by the next start of the command, and its time counts from that start, imports included.

Exit code 0: each fault was explained (rank, step and stage, call site, file: whichever there is to tell) within 10 s, the job ended
in that time with the exit code that it must have or went on as it must, and no process was left.  Needs Linux: /proc says which
processes belong to a job.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN, PLANTS = str(ROOT / "pretrain_gpt_moe.py"), str(ROOT / "benchmarks" / "fault_plants.py")
OVERRIDES = (
    "model=tiny train.seq_len=32 train.global_batch_size=8 train.micro_batch_size=1 train.eval_interval=0 launch.device=cpu "
    "parallel.ep=2 parallel.zero=1 data=indexed tracker=minimal tracker.progress=none cluster.peak_tflops=1 hang.timeout_s=3"
).split()
SHORT, ENDLESS = ("train.steps=8", "checkpoint.interval=2"), ("train.steps=1000000",)
SAVED, BEFORE = "step_00000004", "step_00000002"  # the checkpoints of the run whose files are damaged
MARK = "MEGALINA_FAULTS"  # in the environment of every process of a job, and of no other
FAULT_FILE = "fault_s"  # where a plant writes the time
WITHIN_S = 10.0
GIVE_UP_S = 90.0
POLL_S = 0.02
SHOWN_LINES, SHOWN_COLUMNS = 4, 150


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

    def left(self) -> list[int]:
        """The processes that are there although the launcher has ended; they have 3 s to go."""
        deadline_s = time.time() + 3
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
    """A run with a fault.  The command whose outcome counts is the last one that was started, unless it is said otherwise."""

    def __init__(self, fault: "Fault", folder: Path) -> None:
        self.fault, self.folder, self.run = fault, folder, folder / fault.name
        self.starts: list[Command] = []
        self.fault_s: float | None = None

    def start(self, *settings: str, plant: str = "", run: Path | None = None) -> Command:
        data = (f"data.prefix={self.folder / 'tokens'}", f"data.cache_dir={self.folder / 'cache'}")
        own = (f"run.dir={run or self.run}", f"launch.ranks={self.fault.ranks}", *data, *OVERRIDES, *settings)
        self.starts.append(Command([PLANTS, "command", plant, *own] if plant else [PRETRAIN, *own]))
        return self.starts[-1]

    def trained(self) -> int:
        """Steps in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_step(self, command: Command, step: int) -> None:
        """RuntimeError where the job ends before, or does not get there."""
        deadline_s = time.time() + GIVE_UP_S
        while self.trained() < step:
            if not command.running or time.time() > deadline_s:
                raise RuntimeError(f"the job does not reach step {step}: {command.text[-1000:]}")
            time.sleep(POLL_S)

    def end_all(self) -> None:
        for command in self.starts:
            command.kill_all()


Strike = Callable[[Job], Command]
After = Callable[[Job], list[str]]


@dataclass(frozen=True)
class Fault:
    """One fault: how it strikes, and what must come of it."""

    name: str
    what: str
    strike: Strike  # starts the job, brings the fault about (job.fault_s, unless a plant does), returns what must end
    must: tuple[str, ...]  # patterns, each of which a line of the output must match
    code: int = 1  # exit code of the command
    ranks: int = 2
    goes_on: bool = False  # the run is to go on to its end: then the message has to be there in time, not the end
    after: After = lambda job: []  # what else is wrong, when the command has ended


@dataclass
class Outcome:
    """What came of a fault; seconds are from the fault on, None: it never came."""

    code: int | None
    message_s: float | None
    end_s: float | None
    left: int
    missing: list[str]
    explanation: list[str]
    wrong: list[str] = field(default_factory=list)
    text: str = ""


def problems(fault: Fault, outcome: Outcome) -> list[str]:
    """What was not as it must be."""
    found = [f"nothing says {pattern!r}" for pattern in outcome.missing]
    if outcome.code != fault.code:
        found.append("the command did not end" if outcome.code is None else f"exit code {outcome.code}, {fault.code} expected")
    if outcome.left:
        found.append(f"{outcome.left} processes were left")
    if fault.must and not outcome.missing and (outcome.message_s is None or outcome.message_s > WITHIN_S):
        found.append(f"the message came after {seconds(outcome.message_s)}")
    if not fault.goes_on and (outcome.end_s is None or outcome.end_s > WITHIN_S):
        found.append(f"the end came after {seconds(outcome.end_s)}")
    return found + outcome.wrong


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def explained(lines: Sequence[tuple[float, str]], must: Sequence[str]) -> tuple[float | None, list[str], list[str]]:
    """When the last of the patterns had been met, those that were not, and the output from the first line that meets one."""
    met = [next((i for i, (_, line) in enumerate(lines) if re.search(pattern, line)), None) for pattern in must]
    found = [i for i in met if i is not None]
    missing = [pattern for pattern, i in zip(must, met, strict=True) if i is None]
    explanation = [line for _, line in lines[min(found) :]] if found else []
    return (lines[max(found)][0] if found else None), missing, explanation


def planted(plant: str, *settings: str) -> Strike:
    return lambda job: job.start(*(settings or SHORT), plant=plant)


def struck(rank: int | None, number: signal.Signals, *settings: str) -> Strike:
    """A signal to a rank, None: to the launcher, when some steps are made."""

    def strike(job: Job) -> Command:
        command = job.start(*(settings or ENDLESS))
        job.wait_for_step(command, 8)
        target = command.launcher.pid if rank is None else command.rank(rank)
        job.fault_s = time.time()
        os.kill(target, number)
        return command

    return strike


def damaged(change: Callable[[Path], None]) -> Strike:
    """A run that ended after step 4 has its newest checkpoint changed, and goes on."""

    def strike(job: Job) -> Command:
        whole = job.folder / "whole"
        if not whole.exists():
            command = job.start(*SHORT, "train.exit_step=4", run=whole)
            command.wait()
            if command.launcher.returncode:
                raise RuntimeError(f"the run whose checkpoints are to be damaged failed: {command.text[-1000:]}")
        shutil.copytree(whole, job.run)
        change(job.run / "checkpoints" / SAVED)
        command = job.start(*SHORT)
        job.fault_s = command.started_s
        return command

    return strike


def largest_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: (path.stat().st_size, path.name))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def second_job(job: Job) -> Command:
    """The first one goes on."""
    first = job.start(*ENDLESS)
    job.wait_for_step(first, 2)
    second = job.start(*ENDLESS)
    job.fault_s = second.started_s
    return second


def first_goes_on(job: Job) -> list[str]:
    first, steps = job.starts[0], job.trained()
    time.sleep(0.5)
    wrong = [] if first.running and job.trained() > steps else ["the first job does not go on"]
    os.kill(first.launcher.pid, signal.SIGTERM)
    first.wait()
    return wrong + ([] if first.launcher.poll() == 143 else [f"the first job ended with {first.launcher.poll()}, not 143"])


def goes_on_when_asked(job: Job) -> list[str]:
    """The same command again goes on from the newest checkpoint."""
    steps = job.trained()
    command = job.start(*ENDLESS, "checkpoint.interval=5", f"train.exit_step={steps + 5}")
    command.wait()
    found = re.search(r"^resumed from \S+ after step (\d+)$", command.text, re.MULTILINE)
    job.starts[0].lines += [(time.time(), f"the same command again: {found[0]}")] if found else []
    wrong = [] if found and int(found[1]) >= steps - 6 else [f"the next start did not go on near step {steps}"]
    return wrong + ([f"the next start ended with {command.launcher.poll()}"] if command.launcher.poll() else [])


def saved_last_step(job: Job) -> list[str]:
    path = job.run / "checkpoints" / f"step_{job.trained():08d}"
    return [] if path.is_dir() else [f"{path.name} was not saved"]


def ended_with(aside: str = "", **values: int) -> After:
    """The run reached its last step, and its summary has these values; a checkpoint was set aside."""

    def check(job: Job) -> list[str]:
        path = job.run / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {}
        wanted = {"finished": True, **values}
        wrong = [f"{key} is {summary.get(key)}, not {value}" for key, value in wanted.items() if summary.get(key) != value]
        there = sorted(p.name for p in (job.run / "checkpoints").glob("*.damaged"))
        return wrong + ([f"set aside: {there}"] if there != ([aside] if aside else []) else [])

    return check


def nothing_updated(job: Job) -> list[str]:
    found = {path.name: path.read_text() for path in job.run.glob("weights.*")}
    return [] if found == {f"weights.{rank}": "same" for rank in range(job.fault.ranks)} else [f"updated: {found}"]


STANDS, PLANT = "no rank has made progress", r'fault_plants\.py", line \d+'
SITE = r"at \S*megalina/parallel/\w+\.py:\d+"
IN_EXPERTS = r"stage F:experts\.0\.0"
KILLED = r"rank 1 of {} was ended by SIGKILL \(out of memory\?\) in step \d+, (stage \S|between)"


def damage(name: str, what: str, change: Callable[[Path], None], file: str, reason: str) -> Fault:
    must = (rf"{SAVED} is damaged and passed over for {BEFORE}: .*{file}: .*{reason}", rf"resumed from \S+{BEFORE} after step 2")
    return Fault(name, what, damaged(change), must, 0, goes_on=True, after=ended_with(aside=f"{SAVED}.damaged", steps=8))


def stopped(rank: int) -> Fault:
    must = (rf"rank {rank} does not answer: its process is stopped.* it was last in step \d+, ", r"waits in stage \S+ of step \d+")
    return Fault(f"stop_rank_{rank}", f"SIGSTOP to rank {rank}", struck(rank, signal.SIGSTOP), must)


FAULTS = (
    Fault(
        *("swap_buckets", "two buckets of equal size in the other order on rank 1", planted("swap_buckets")),
        (r"collectives in step 3; nothing was updated", rf"rank 0: sum in stage B:dense\.1> of step 3 .*{SITE}",
         rf"rank 1: sum in stage B:dense\.0> of step 3 .*{SITE}"),
        after=nothing_updated,
    ),
    Fault(
        *("another_size", "a sum of twice the size on rank 1", planted("another_size")),
        (r"is not the same on all ranks", rf"rank 0: sum in stage U:divisor> ?\S* of step 3 .* 4 rows .*{SITE}",
         rf"rank 1: sum in stage U:divisor> ?\S* of step 3 .* 8 rows .*{SITE}"),
    ),
    Fault(
        *("extra_collective", "rank 1 waits for a sum that no other asks for", planted("extra_collective")),
        (STANDS, rf"rank 1 computes in {IN_EXPERTS} of step 3", PLANT, r"start_sum\(torch\.zeros\(4\)", r"rank 0 waits in stage \S"),
    ),
    Fault(
        *("wrong_splits", "rank 1 expects 3 rows more of an all-to-all", planted("wrong_splits")),
        (r"on axis ep has sizes that don't match", r"rank 0 sends \d+", r"rank 1 receives \d+",
         rf"stage F:dispatch>\.0\.0 of step 3.*{SITE}"),
    ),
    Fault(
        *("stall", "rank 2 of 4 sleeps in a stage", planted("stall")),
        (STANDS, rf"rank 2 computes in {IN_EXPERTS} of step 3", PLANT, r"rank 3 waits in stage F:combine<\.0\.0.* rank 2 has not"),
        ranks=4,
    ),
    Fault(
        *("loop", "an endless loop in a stage on rank 0", planted("loop")),
        (STANDS, rf"rank 0 computes in {IN_EXPERTS} of step 3", PLANT, r"while True", r"rank 1 waits in stage \S"),
    ),
    Fault(
        *("stall_data", "rank 1 never gets its sequences", planted("stall_data")),
        (STANDS, r"rank 1 is outside of the stages, in step 3", PLANT, r"time\.sleep", r"rank 0 waits in stage \S"),
    ),
    stopped(0),
    stopped(1),
    Fault(
        *("kill_rank", "SIGKILL to rank 1 of 4", struck(1, signal.SIGKILL)),
        (KILLED.format(4), r"ranks? [\d, ]+ w(as|ere) in step \d+, "),
        ranks=4,
    ),
    Fault(
        *("raise_error", "rank 1 raises in a stage", planted("raise_error")),
        (rf"rank 1 of 2 failed with exit code 1 in step 3, {IN_EXPERTS}", PLANT, r"KeyError: 'the lost key'"),
    ),
    Fault(
        *("kill_launcher", "SIGKILL to the launcher", struck(None, signal.SIGKILL, *ENDLESS, "checkpoint.interval=5")),
        *((), -signal.SIGKILL),
        after=goes_on_when_asked,
    ),
    Fault(
        *("terminate_launcher", "SIGTERM to the launcher", struck(None, signal.SIGTERM)),
        (r"SIGTERM: the ranks finish their step and save", r"stopped after step \d+ as asked"),
        128 + signal.SIGTERM,
        after=saved_last_step,
    ),
    Fault("second_job", "a second job in the run folder", second_job, (r"another job is running there",), 2, after=first_goes_on),
    Fault(
        *("full_disk", "rank 1 has no space left in the second save", planted("full_disk")),
        (rf"{SAVED} could not be written: rank 1: .*No space left on device.*the run goes on",),
        0,
        goes_on=True,
        after=ended_with(steps=8, failed_saves=1),
    ),
    damage("flip_bit", "one bit of a shard", lambda path: flip_bit(largest_shard(path)), r"__\d_0\.distcp", "checksum"),
    damage("truncate", "a shard is 1000 bytes short", lambda path: truncate(largest_shard(path)), r"__\d_0\.distcp", "bytes"),
    damage("missing_file", "a shard is gone", lambda path: largest_shard(path).unlink(), r"__\d_0\.distcp", "there is no such file"),
    damage("damage_values", "one bit of values.json", lambda path: flip_bit(path / "values.json"), r"values\.json", "checksum"),
    Fault(
        *("bad_weight", "a weight on rank 1 is NaN in one step", planted("bad_weight")),
        (r"step 3 is skipped on all ranks.*the first is the output of stage F:experts\.1\.0 on rank 1",),
        0,
        goes_on=True,
        after=ended_with(steps=8, skipped_steps=1),
    ),
    Fault(
        *("restart", "SIGKILL to rank 1, launch.restarts=1",
          struck(1, signal.SIGKILL, "train.steps=120", "checkpoint.interval=5", "launch.restarts=1")),
        (KILLED.format(2), r"start 2 of 2, from checkpoint step_\d+"),
        0,
        goes_on=True,
        after=ended_with(steps=120),
    ),
)  # fmt: skip


def outcome_of(fault: Fault, folder: Path) -> Outcome:
    """Run the job with its fault.  In the end none of its processes is there, whatever happens."""
    job = Job(fault, folder)
    try:
        command = fault.strike(job)
        command.wait()
        code, left = command.launcher.poll(), command.left()
        end_s = time.time()
        if (job.run / FAULT_FILE).exists():
            job.fault_s = float((job.run / FAULT_FILE).read_text())
        wrong = fault.after(job) if code is not None else []
        left += [number for start in job.starts if not start.running for number in start.left()]
        job.end_all()
    except (RuntimeError, OSError) as error:
        return Outcome(None, None, None, 0, list(fault.must), [], [str(error)])
    finally:
        job.end_all()
    message_s, missing, explanation = explained(command.lines, fault.must)
    if job.fault_s is None:
        wrong.append("the fault never began")
    begin_s = job.fault_s if job.fault_s is not None else end_s
    return Outcome(
        code,
        message_s - begin_s if message_s is not None and not missing else None,
        end_s - begin_s if code is not None and not fault.goes_on else None,
        len(set(left)),
        missing,
        explanation or [line for _, line in command.lines],
        wrong,
        command.text,
    )


def row_of(fault: Fault, outcome: Outcome) -> dict[str, Any]:
    wrong = problems(fault, outcome)
    return {
        "fault": fault.name,
        "planted": fault.what,
        "message": seconds(outcome.message_s),
        "end": "went on" if fault.goes_on and not wrong else seconds(outcome.end_s),
        "code": "-" if outcome.code is None else str(outcome.code),
        "left": str(outcome.left),
        "explained": "no" if outcome.missing else "yes" if fault.must else "(nobody left)",
        "good": "no" if wrong else "yes",
    }


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows with their columns under each other."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_tokens(prefix: Path) -> None:
    import numpy as np

    from megalina.data.indexed import IndexedWriter

    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(400):
            start, count = int(rng.integers(512)), int(rng.integers(20, 200))
            writer.add_document((start + np.arange(count) * 7 + rng.integers(0, 3, count)) % 512)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file, with all that each job said")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS], help="these faults alone")
    parser.add_argument("--list", action="store_true", help="names and what they are; nothing is run")
    parser.add_argument("--verbose", action="store_true", help="whole explanations, not their first lines")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    if options.list:
        print(table([{"fault": fault.name, "planted": fault.what} for fault in faults]))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # we end what we started; and a shell's background job would ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    begin_s, results, rows = time.monotonic(), [], []
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        folder = Path(name)
        write_tokens(folder / "tokens")
        for fault in faults:
            outcome = outcome_of(fault, folder)
            wrong, row = problems(fault, outcome), row_of(fault, outcome)
            rows.append(row)
            results.append({**row, "wrong": wrong, **vars(outcome)})
            print(f"{fault.name}: {'; '.join(wrong) or 'as it must be'}", file=sys.stderr, flush=True)
    print(table(rows))
    for result in results:
        shown = result["explanation"] if options.verbose else result["explanation"][:SHOWN_LINES]
        print(f"\n{result['fault']}: {result['planted']}")
        print("\n".join(f"  | {line if options.verbose else line[:SHOWN_COLUMNS]}" for line in shown))
        print("\n".join(f"  WRONG: {line}" for line in result["wrong"]), end="\n" if result["wrong"] else "")
    bad = sum(bool(result["wrong"]) for result in results)
    wall_s = round(time.monotonic() - begin_s, 1)
    print(f"\n{len(results)} faults, {bad} not as they must be; {wall_s:.0f} s in all")
    if options.json:
        machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}
        options.json.write_text(json.dumps({"faults": results, "wall_s": wall_s, **machine, "good": not bad}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
