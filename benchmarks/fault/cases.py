"""The cases of the table of faults: how each strikes, what its job must say and do, and what was not as it must be."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.fault.jobs import Command, Job

SHORT, ENDLESS = ("train.steps=8", "checkpoint.interval=2"), ("train.steps=1000000",)
SAVED, BEFORE = "step_00000004", "step_00000002"  # the checkpoints of the run whose files are damaged
WITHIN_S = 10.0

Strike = Callable[["Job"], "Command"]
After = Callable[["Job"], list[str]]


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


def core(explanation: Sequence[str], must: Sequence[str]) -> list[str]:
    """The lines that it must have: for each pattern the first that meets it."""
    first = {next((i for i, line in enumerate(explanation) if re.search(pattern, line)), None) for pattern in must}
    return [explanation[i] for i in sorted(i for i in first if i is not None)] or list(explanation[-1:])


def start_planted(job: "Job", plant: str, settings: Sequence[str]) -> "Command":
    return job.start(*SHORT, *settings, plant=plant)


def planted(plant: str, *settings: str) -> Strike:
    return partial(start_planted, plant=plant, settings=settings)


def struck(rank: int | None, number: signal.Signals, *settings: str) -> Strike:
    """A signal to a rank, None: to the launcher, when some steps are made."""

    def strike(job: "Job") -> "Command":
        command = job.start(*(settings or ENDLESS))
        job.wait_until(command, lambda: job.trained() >= 8)
        target = command.launcher.pid if rank is None else command.rank(rank)
        job.fault_s = time.time()
        os.kill(target, number)
        return command

    return strike


def damaged(change: Callable[[Path], None]) -> Strike:
    """A run that ended after step 4 has its newest checkpoint changed, and is to go on.  Its time begins when the ranks look at
    checkpoints: what they do next, after they have noted where they are."""

    def strike(job: "Job") -> "Command":
        whole = job.folder / "whole"
        if not whole.exists():
            command = job.start(*SHORT, "train.exit_step=4", run=whole)
            command.wait()
            if command.launcher.returncode:
                raise RuntimeError(f"the run whose checkpoints are to be damaged failed: {command.text[-1000:]}")
        shutil.copytree(whole, job.run, ignore=shutil.ignore_patterns("logs"))
        change(job.run / "checkpoints" / SAVED)
        command = job.start(*SHORT)
        job.fault_s = job.wait_until(command, (job.run / "logs" / "rank_0.position").exists)
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


def second_job(job: "Job") -> "Command":
    """The first one goes on."""
    first = job.start(*ENDLESS)
    job.wait_until(first, lambda: job.trained() >= 2)
    second = job.start(*ENDLESS)
    job.fault_s = second.started_s
    return second


def first_goes_on(job: "Job") -> list[str]:
    first, steps = job.starts[0], job.trained()
    time.sleep(0.5)
    wrong = [] if first.running and job.trained() > steps else ["the first job does not go on"]
    os.kill(first.launcher.pid, signal.SIGTERM)
    first.wait()
    return wrong + ([] if first.launcher.poll() == 143 else [f"the first job ended with {first.launcher.poll()}, not 143"])


def goes_on_when_asked(job: "Job") -> list[str]:
    """The same command again goes on from the newest checkpoint."""
    steps = job.trained()
    command = job.start(*ENDLESS, "checkpoint.interval=5", f"train.exit_step={steps + 5}")
    command.wait()
    found = re.search(r"^resumed from \S+ after step (\d+)$", command.text, re.MULTILINE)
    job.starts[0].lines += [(time.time(), f"the same command again: {found[0]}")] if found else []
    wrong = [] if found and int(found[1]) >= steps - 6 else [f"the next start did not go on near step {steps}"]
    return wrong + ([f"the next start ended with {command.launcher.poll()}"] if command.launcher.poll() else [])


def saved_last_step(job: "Job") -> list[str]:
    path = job.run / "checkpoints" / f"step_{job.trained():08d}"
    return [] if path.is_dir() else [f"{path.name} was not saved"]


def ended_with(aside: str = "", **values: int) -> After:
    """The run reached its last step, and its summary has these values; a checkpoint was set aside."""

    def check(job: "Job") -> list[str]:
        path = job.run / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {}
        wanted = {"finished": True, **values}
        wrong = [f"{key} is {summary.get(key)}, not {value}" for key, value in wanted.items() if summary.get(key) != value]
        there = sorted(p.name for p in (job.run / "checkpoints").glob("*.damaged"))
        return wrong + ([f"set aside: {there}"] if there != ([aside] if aside else []) else [])

    return check


def nothing_updated(job: "Job") -> list[str]:
    found = {path.name: path.read_text() for path in job.run.glob("weights.*")}
    return [] if found == {f"weights.{rank}": "same" for rank in range(job.ranks)} else [f"updated: {found}"]


SHARD, STANDS, PLANT = r"__\d_0\.distcp", "no rank has made progress", r'fault/plants\.py", line \d+, in '
SITE, PLANT_SITE = r"at \S*megalina/parallel/\w+\.py:\d+", r"at \S*fault/plants\.py:\d+"
IN_EXPERTS = r"instruction F:experts\.0\.0"
STAGES = ("parallel.ep=1", "parallel.pp=2", "parallel.pp_layout='Et|tL'")
KILLED = r"rank {} of {} was ended by SIGKILL \(out of memory\?\) in step \d+, (instruction \S|between)"


def damage(name: str, what: str, change: Callable[[Path], None], file: str, reason: str) -> Fault:
    must = (rf"{SAVED} is damaged and passed over for {BEFORE}: .*{file}: .*{reason}", rf"resumed from \S+{BEFORE} after step 2")
    return Fault(name, what, damaged(change), must, 0, goes_on=True, after=ended_with(aside=f"{SAVED}.damaged", steps=8))


def stopped(rank: int) -> Fault:
    last = rf"rank {rank} does not answer: its process is stopped.* it was last in step \d+, (instruction \S|between)"
    must = (STANDS, last, rf"rank {1 - rank} waits in instruction \S+ of step \d+")
    return Fault(f"stop_rank_{rank}", f"SIGSTOP to rank {rank}", struck(rank, signal.SIGSTOP), must)


FAULTS = (
    Fault(
        *("swap_buckets", "two buckets of equal size in the other order on rank 1", planted("swap_buckets")),
        (r"collectives in step 3; nothing was updated", rf"rank 0: \w+ in instruction B:dense\.1>\S* of step 3 .*{SITE}",
         rf"rank 1: \w+ in instruction B:dense\.0>\S* of step 3 .*{SITE}"),
        after=nothing_updated,
    ),
    Fault(
        *("another_size", "a sum of twice the size on rank 1", planted("another_size")),
        (r"is not the same on all ranks", rf"rank 0: sum in instruction U:divisor>\S* of step 3 .* 4 rows .*{SITE}",
         rf"rank 1: sum in instruction U:divisor>\S* of step 3 .* 8 rows .*{PLANT_SITE}"),
    ),
    Fault(
        *("extra_collective", "rank 1 waits for a sum that no other asks for", planted("extra_collective")),
        (STANDS, rf"rank 1 computes in {IN_EXPERTS} of step 3", PLANT + "one_more", r"start_sum\(torch\.zeros",
         r"rank 0 waits in instruction \S"),
    ),
    Fault(
        *("wrong_splits", "rank 1 expects 3 rows more of an all-to-all", planted("wrong_splits")),
        (r"on axis ep has sizes that don't match", rf"rank 0 sends \d+ .* instruction F:dispatch>\.0\.0 of step 3.*{SITE}",
         rf"rank 1 receives \d+ .* instruction F:dispatch>\.0\.0 of step 3.*{PLANT_SITE}"),
    ),
    Fault(
        *("stall", "rank 2 of 4 sleeps in an instruction", planted("stall")),
        (STANDS, rf"rank 2 computes in {IN_EXPERTS} of step 3", PLANT + "<lambda>",
         r"rank 3 waits in instruction F:combine<.* which rank 2 has not"),
        ranks=4,
    ),
    Fault(
        *("loop", "an endless loop in an instruction on rank 0", planted("loop")),
        (STANDS, rf"rank 0 computes in {IN_EXPERTS} of step 3", PLANT + "endless", r"while True", r"rank 1 waits in instruction \S"),  # noqa: E501
    ),
    Fault(
        *("stall_data", "rank 1 never gets its sequences", planted("stall_data")),
        (STANDS, r"rank 1 is outside of the instructions, in step 3", PLANT + "batch", r"time\.sleep", r"rank 0 waits in instruction \S"),  # noqa: E501
    ),
    stopped(0),
    stopped(1),
    Fault(
        *("kill_rank", "SIGKILL to rank 1 of 4", struck(1, signal.SIGKILL)),
        (KILLED.format(1, 4), r"ranks? [\d, ]+ w(as|ere) in step \d+, "),
        ranks=4,
    ),
    Fault(
        *("kill_stage", "SIGKILL to the first of two stages", struck(0, signal.SIGKILL, *ENDLESS, *STAGES)),
        (KILLED.format(0, 2), r"rank 1 was in step \d+, "),
    ),
    Fault(
        *("stall_send", "the first of two stages stops in a SEND", planted("stall_send", *STAGES)),
        (STANDS, r"rank 0 computes in instruction F:stream>\.1\.2 of step 3", PLANT + "start", r"time\.sleep",
         r"rank 1 waits in instruction F:stream<\.1\.2 of step 3.* on axis pp0-1 \(message\), which rank 0 has not submitted"),
    ),
    Fault(
        *("raise_error", "rank 1 raises in an instruction", planted("raise_error")),
        (rf"rank 1 of 2 failed with exit code 1 in step 3, {IN_EXPERTS}", PLANT + "fail", r"KeyError: 'the lost key'"),
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
    damage("flip_bit", "one bit of a shard", lambda path: flip_bit(largest_shard(path)), SHARD, "checksum"),
    damage("truncate", "a shard is 1000 bytes short", lambda path: truncate(largest_shard(path)), SHARD, "bytes"),
    damage("missing_file", "a shard is gone", lambda path: largest_shard(path).unlink(), SHARD, "there is no such file"),
    damage("damage_values", "one bit of values.json", lambda path: flip_bit(path / "values.json"), r"values\.json", "checksum"),
    Fault(
        *("bad_weight", "a weight on rank 1 is NaN in one step", planted("bad_weight")),
        (r"step 3 is skipped on all ranks.*the first is the output of instruction F:experts\.1\.0 on rank 1",),
        0,
        goes_on=True,
        after=ended_with(steps=8, skipped_steps=1),
    ),
    Fault(
        *("restart", "SIGKILL to rank 1, launch.restarts=1",
          struck(1, signal.SIGKILL, "train.steps=120", "checkpoint.interval=5", "launch.restarts=1")),
        (KILLED.format(1, 2), r"start 2 of 2, from checkpoint step_\d+"),
        0,
        goes_on=True,
        after=ended_with(steps=120),
    ),
)  # fmt: skip


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows with their columns under each other."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
