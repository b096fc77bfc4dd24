"""Kills at random moments: a run that is killed N times ends with the very bits of a run that nobody disturbed.

    python benchmarks/chaos.py --kills 20 --json chaos.json
    python benchmarks/chaos.py --kills 20 --layouts zb_h1               two pipeline ranks; see LAYOUTS
    python benchmarks/chaos.py --kills 20 --layouts 1f1b zbv ep zb_h1   each start in the next one
    python benchmarks/chaos.py --kills 200 --layouts all --optim muon   each start with even odds in another one, drawn

Trains a small model twice with the public command, on two ranks with ZeRO-1, expert-parallel ones unless --layouts says
otherwise: once left alone, once killed N times and started again with the same command until it is done.  Then the final
checkpoints are compared, weights, optimizer state and counters, bit for bit, and the records of every step.  With several layouts
all is computed in float64, and rounding may differ: losses by 1e-12, the rest by 1e-10.  The kills are drawn from --seed: a rank,
all ranks or the launcher; SIGKILL, SIGTERM or SIGINT; in the start-up, at a step, or inside a save; the second half of them with
asynchronous saves.  Some starts have launch.restarts, and then the launcher must go on by itself after a lost rank.  "Inside a
save" is observed: the hidden folder of the save is there right before the signal and right after it, or that save was never
completed.

Exit code 0: equal, with enough kills of each kind, and after each kill the job ended in time and as it should, left no
process, and lost no more than the steps since the last save.  Needs Linux: /proc says which processes belong to the run.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random

import numpy as np
import torch
from chaos_plan import (
    INTERVAL,
    RANKS,
    End,
    Kill,
    compare,
    draw,
    last_step,
    problems,
    saved_steps,
    saving_step,
    shortages,
    steps_of,
    summary,
    table,
)

from megalina.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parent.parent
# A step takes some 50 ms, and a save of 40 MB as long: long enough to be met.
OVERRIDES = (
    "model=tiny model.d_model=128 model.d_ff=512 model.num_experts=8 train.seq_len=64 train.global_batch_size=4 "
    "train.micro_batch_size=1 train.eval_interval=0 launch.device=cpu parallel.zero=1 data=indexed "
    f"tracker=minimal tracker.progress=none cluster.peak_tflops=1 launch.ranks={RANKS} checkpoint.interval={INTERVAL}"
).split()
STAGES = "parallel.pp=2"
LAYOUTS = {
    "ep": ("parallel.ep=2",),
    "tp": ("parallel.tp=2",),
    "cp": ("parallel.cp=2",),
    "dp": ("parallel.zero=0",),
    "flow": ("parallel.ep=2", "strategy=flow"),
    "lina_nopack": ("parallel.ep=2", "strategy=lina_nopack"),
    "lancet": ("parallel.ep=2", "strategy=lancet"),
    "once": ("parallel.ep=2", "parallel.dispatch=once_per_rank"),
    "1f1b": (STAGES, "strategy.pipeline=1f1b"),
    "zb_h1": (STAGES, "strategy.pipeline=zb_h1"),
    "zbv": (STAGES, "strategy.pipeline=zbv", "parallel.pp_chunks=2"),
}
ALL = "all"  # of them
MARK = "MEGALINA_CHAOS"  # in the environment of every process of the run, and of no other
LAUNCH_S, RANKS_START_S, STEP_S = 5.0, 3.0, 0.06  # roughly; random moments are fractions of them
LAUNCHER_END_S, END_S, SAVE_AND_END_S = 3.0, 20.0, 60.0  # so soon all processes must be gone: after a kill of the launcher,
# whose ranks the system ends; of a rank; after a signal that asks to stop
STALL_S = 180.0  # the run is given up when it makes no step for so long
POLL_S = 0.0005
SHOW_S = 0.2

Processes = dict[int, tuple[int, str]]  # {number: (its parent's, RANK in its environment)}
Command = Callable[[bool, int], list[str]]  # (checkpoint.async_save, launch.restarts)


class Line:
    """A line on stderr for each thing that is done, and on a terminal a live one for what is under way."""

    def __init__(self) -> None:
        self._live, self._shown_s = sys.stderr.isatty(), 0.0

    def show(self, what: str, step: int) -> None:
        if self._live and time.monotonic() - self._shown_s > SHOW_S:
            print(f"\r\x1b[K{what}: step {step}", end="", file=sys.stderr, flush=True)
            self._shown_s = time.monotonic()

    def done(self, what: str) -> None:
        print(f"\r\x1b[K{what}" if self._live else what, file=sys.stderr, flush=True)


class Job:
    """One run, from outside: one start of the command after the other, its steps and its processes."""

    def __init__(self, run: Path, command: Command) -> None:
        self.run, self._command = run, command
        self._mark = f"{os.getpid()}.{time.time_ns()}"
        self._launcher: subprocess.Popen[bytes] | None = None
        self._log = run.with_name(f"{run.name}_0.log")
        self._starts = 0
        self.look_anew()

    @property
    def launcher(self) -> "subprocess.Popen[bytes]":
        assert self._launcher is not None
        return self._launcher

    @property
    def running(self) -> bool:
        return self._launcher is not None and self._launcher.poll() is None

    def start(self, *, async_save: bool, restarts: int) -> None:
        self.look_anew()
        self._starts += 1
        self._log = self.run.with_name(f"{self.run.name}_{self._starts}.log")
        with open(self._log, "wb") as log:
            self._launcher = subprocess.Popen(
                self._command(async_save, restarts),
                env={**os.environ, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us alone
            )

    def look_anew(self) -> None:
        """Before ranks start: what metrics.jsonl holds is not theirs.  Their first deed is to replace that file."""
        self._before = self._inode()
        self.resumed_step: int | None = None
        self.trained_s: float | None = None  # when they had logged a step
        self.step = 0
        self._changed_s = time.monotonic()

    def look(self) -> int:
        """The last step that these ranks have logged.  RuntimeError if there is no new one for too long."""
        now_s = time.monotonic()
        if self.resumed_step is None and self._inode() not in (None, self._before):
            self.resumed_step = self.step = last_step(self.run)
        if self.resumed_step is not None and (step := last_step(self.run)) > self.step:
            self.step, self._changed_s = step, now_s
            self.trained_s = self.trained_s or now_s
        if now_s - self._changed_s > STALL_S:
            raise RuntimeError(f"no step for {STALL_S:.0f} s after step {self.step}: {self.said()[-500:]}")
        return self.step

    def processes(self) -> Processes:
        """Every living process of the run."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    environment = dict(item.partition(b"=")[::2] for item in (folder / "environ").read_bytes().split(b"\0"))
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:  # it has just ended, or is another user's
                    continue
                if environment.get(MARK.encode()) == self._mark.encode():
                    found[int(folder.name)] = (parent, environment.get(b"RANK", b"").decode())
        return found

    def targets(self, target: str, processes: Processes) -> list[int]:
        """The numbers of the launcher, of one rank or of all ranks, as far as they are among `processes`."""
        if target == "launcher":
            return [self.launcher.pid]
        ranks = {f"rank {rank}": n for n, (parent, rank) in processes.items() if rank and parent == self.launcher.pid}
        return [number for rank, number in ranks.items() if target in (rank, "all ranks")]

    def said(self) -> str:
        """By the launcher and by rank 0, since the last start."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def kill_all(self) -> None:
        while left := self.processes():
            for number in left:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
        if self._launcher is not None:
            self._launcher.wait()

    def _inode(self) -> int | None:
        try:
            return (self.run / "metrics.jsonl").stat().st_ino
        except FileNotFoundError:
            return None


def wait_for_moment(job: Job, kill: Kill, save_s: float, show: Callable[[int], None]) -> Processes:
    """Until it is time for the kill; returns the run's processes.  RuntimeError if the run ends before."""

    def until(reached: Callable[[], bool], pause_s: float = POLL_S) -> None:
        while not reached():
            show(job.look())
            if not job.running:
                raise RuntimeError(f"the run ended with {job.launcher.returncode} before it was killed: {job.said()[-500:]}")
            time.sleep(pause_s)

    def pass_by(duration_s: float) -> None:
        deadline_s = time.monotonic() + duration_s
        until(lambda: time.monotonic() >= deadline_s)

    if kill.moment == "startup":
        if kill.target != "launcher":
            until(lambda: len(job.targets("all ranks", job.processes())) == RANKS, 0.01)
        pass_by(kill.fraction * (LAUNCH_S if kill.target == "launcher" else RANKS_START_S))
        return job.processes()
    until(lambda: job.trained_s is not None)
    processes = job.processes()  # now: later it would take a good part of a save
    until(lambda: job.step >= (job.resumed_step or 0) + kill.after_steps)
    if kill.moment == "running":
        pass_by(kill.fraction * STEP_S)
        return processes
    delay_s = kill.fraction * save_s
    while True:
        until(lambda: saving_step(job.run) is not None)
        saving = saving_step(job.run)
        pass_by(delay_s)
        if saving is not None and saving_step(job.run) == saving:
            return processes
        delay_s /= 2  # that save was shorter


def strike(job: Job, kill: Kill, before: Processes) -> tuple[End, float]:
    """Sends the signal and watches what comes of it; also when it was sent.  RuntimeError if there is no such process."""
    numbers = job.targets(kill.target, before)
    if not numbers:
        raise RuntimeError(f"{kill.target} is not there: {job.said()[-500:]}")
    saving = saving_step(job.run)
    killed_s = time.monotonic()
    for number in numbers:
        os.kill(number, signal.Signals[kill.how])
    still = saving is not None and saving_step(job.run) == saving
    job.look()

    def left() -> set[int]:
        job.launcher.poll()
        now = set(job.processes())
        return now & before.keys() - {job.launcher.pid} if kill.relaunch else now  # the launcher starts new ones

    limit_s = SAVE_AND_END_S if kill.graceful else LAUNCHER_END_S if kill.target == "launcher" else END_S
    while left() and time.monotonic() < killed_s + limit_s:
        time.sleep(0.005)
    gone_s, leftovers = time.monotonic() - killed_s, len(left())
    if not kill.relaunch:
        job.kill_all()
    trained, step, saved = job.trained_s is not None, last_step(job.run), saved_steps(job.run)[0]
    inside = not kill.graceful and trained and saving is not None and (still or saved < saving)
    return End(step, trained, inside, saved, job.launcher.poll(), job.said(), gone_s, leftovers), killed_s


def disturb(job: Job, plan: Sequence[Kill], save_s: float, line: Line) -> tuple[list[End], list[float], list[str]]:
    """All kills, then the rest of the run: what was seen, the seconds until training went on, what was wrong."""
    ends: list[End] = []
    lost_s: list[float] = []
    wrong: list[str] = []
    killed_s: float | None = None

    def note_return(otherwise_s: float) -> None:
        if killed_s is not None:
            lost_s.append((job.trained_s or otherwise_s) - killed_s)
            if job.resumed_step is not None and job.resumed_step < ends[-1].saved_step:
                wrong.append(f"kill {len(ends)}: went on from step {job.resumed_step}, not from {ends[-1].saved_step}")

    try:
        for i, kill in enumerate(plan):
            if not job.running:
                restarts = next((n for n, later in enumerate(plan[i:]) if not later.relaunch), len(plan) - i)
                job.start(async_save=kill.async_save, restarts=restarts)
            subject = f"kill {i + 1} of {len(plan)}: {kill.how} to {kill.target} ({kill.moment})"
            processes = wait_for_moment(job, kill, save_s, partial(line.show, subject))
            end, now_s = strike(job, kill, processes)
            note_return(now_s)
            ends.append(end)
            killed_s = now_s
            wrong += [f"kill {i + 1}: {problem}" for problem in problems(kill, end)]
            line.done(f"{subject} after step {end.step}, {end.lost_steps} lost")
            job.look_anew()
        if not job.running:
            job.start(async_save=plan[-1].async_save, restarts=0)
        while job.running:
            line.show("the rest of the run", job.look())
            time.sleep(POLL_S)
        note_return(time.monotonic())
        if job.launcher.returncode:
            wrong.append(f"the last start ended with {job.launcher.returncode}: {job.said()[-500:]}")
    except (RuntimeError, OSError) as error:
        wrong.append(f"given up after {len(ends)} kills: {error}")
    finally:
        job.kill_all()
    return ends, lost_s, wrong


def leave_alone(job: Job, line: Line) -> float:
    """Trains to the end; returns the median of the seconds that a save took.  RuntimeError if the run fails."""
    job.start(async_save=False, restarts=0)
    seen: dict[int, list[float]] = {}
    try:
        while job.running:
            if (saving := saving_step(job.run)) is not None:
                seen.setdefault(saving, []).append(time.monotonic())
            line.show("undisturbed", job.look())
            time.sleep(POLL_S)
    finally:
        job.kill_all()
    if job.launcher.returncode:
        raise RuntimeError(f"the undisturbed run ended with {job.launcher.returncode}: {job.said()[-2000:]}")
    line.done(f"undisturbed: {job.step} steps")
    return float(np.median([times[-1] - times[0] for times in seen.values()]))


def write_tokens(prefix: Path) -> None:
    """A corpus with something to learn, so small that opening it takes no time."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(400):
            start, count = int(rng.integers(512)), int(rng.integers(20, 200))
            writer.add_document((start + np.arange(count) * 7 + rng.integers(0, 3, count)) % 512)


def wandering(names: Sequence[str], seed: int) -> Iterator[str]:
    """Without end: the first one, then each time with even odds the one before or another one."""
    random, here = Random(seed), names[0]
    while True:
        yield here
        if random.random() < 0.5:
            here = random.choice([name for name in names if name != here])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default 0)")
    parser.add_argument("--layouts", nargs="+", choices=(*LAYOUTS, ALL), default=["ep"],
                        help="of the starts, in turn; the undisturbed run has the first; all: each start is with even odds in "
                        "the one before or in another one")  # fmt: skip
    parser.add_argument("--optim", default="adamw", choices=("adamw", "sgd", "muon", "muon_clip"), help="default adamw")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--dir", type=Path, help="a new folder for both runs, which is kept (default runs/chaos_TIME)")
    options = parser.parse_args()
    folder = (options.dir or Path("runs", time.strftime("chaos_%Y-%m-%d_%H-%M-%S"))).resolve()
    if options.kills < 1:
        parser.error(f"--kills {options.kills}: at least 1")
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--dir {folder} is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # we end what we started; and a shell's background job would ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    begin_s = time.monotonic()
    write_tokens(folder / "tokens")
    plan, line = draw(options.kills, options.seed), Line()
    drawn = ALL in options.layouts
    names = list(LAYOUTS) if drawn else options.layouts
    steps, moved = steps_of(plan), len(names) > 1
    common = [f"optim={options.optim}", *(["train.dtype=float64"] if moved else [])]
    common += ["model.num_layers=4"] if any(STAGES in LAYOUTS[name] for name in names) else []  # two for each chunk

    def job_of(name: str, layouts: Iterator[str]) -> Job:

        def command(async_save: bool, restarts: int) -> list[str]:
            own = [f"run.dir={folder / name}", f"data.prefix={folder / 'tokens'}", f"data.cache_dir={folder / 'cache'}"]
            own += [f"train.steps={steps}", f"checkpoint.async_save={async_save}", f"launch.restarts={restarts}"]
            return [sys.executable, str(ROOT / "pretrain_gpt_moe.py"), *OVERRIDES, *common, *LAYOUTS[next(layouts)], *own]

        return Job(folder / name, command)

    save_s = leave_alone(job_of("undisturbed", cycle(names[:1])), line)
    layouts = wandering(names, options.seed) if drawn else cycle(names)
    ends, lost_s, wrong = disturb(job_of("disturbed", layouts), plan, save_s, line)
    line.done(f"the rest of the run, after {len(ends)} kills")
    compared = compare(folder / "disturbed", folder / "undisturbed", steps, moved=moved)
    wrong += shortages(plan, ends)
    wrong += [f"the final checkpoints differ in {', '.join(compared['different'][:5])}"] if not compared["equal"] else []
    wrong += [f"the records of steps {compared['different_steps'][:10]} differ"] if compared["different_steps"] else []
    found = {
        **summary(plan, ends, lost_s),
        **compared,
        "wrong": wrong,
        "seed": options.seed,
        "layouts": options.layouts,
        "optim": options.optim,
        "steps": steps,
        "save_s": round(save_s, 4),
        "wall_s": round(time.monotonic() - begin_s, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(table(found["rows"]))
    print(
        f"{found['kills']} kills, {found['inside_save']} inside a save, {found['of_launcher']} of the launcher; "
        f"{found['lost_steps']} steps and {found['lost_s']:.0f} s lost; {steps} steps, {found['wall_s']:.0f} s in all"
    )
    equal = "equal to 1e-12 (losses) and 1e-10 (all else)" if moved else "bit-equal"
    print("\n".join(wrong) or f"{equal} after step {steps}: {' and '.join(compared['final'])}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
