"""Where a host's time goes in a step: real steps on ranks of this machine, with a watch on every instruction.

The program's own thread is split by what it does: math of blocks, router and permutes, update, handing things to the library
(START), taking what has arrived (WAIT), and what lies between instructions.  The same list on next to nothing (`tiny`) has the
same instructions and operators, so the CPU time of that one is interpreter, executor and dispatch of operators, which a GPU's
host pays as well; the rest is this machine's math.  CPU time of other threads is the library's and the lanes'.  Linux says how
long the thread was ready to run and had no core.
"""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalina.config import PretrainConfig
from megalina.data.source import open_data
from megalina.mesh import all_gather_object, build_mesh
from megalina.step.program import Instruction, Kind
from megalina.train.step_runner import StepRunner

WARM_UP = 3  # steps
MOST_SEARCH_STEPS = 300  # of strategy=auto
ROUTING = ("route", "mix", "cut")  # instructions that choose, sort and weigh rows
BLOCKS, ROUTED, UPDATE, SUBMIT, ARRIVED = "blocks", "router and permutes", "update", "submit", "arrivals"
TINY = "tiny"
GROUPS = (BLOCKS, ROUTED, UPDATE, SUBMIT, ARRIVED)


@dataclass(frozen=True, slots=True)
class HostTime:
    """Of a step, medians over steps: wall time; CPU seconds of the program's thread by group, and of it in the whole step; of all
    other threads; seconds asleep in WAITs; ready to run without a core (None: this system doesn't say)."""

    instructions: int
    step_s: float
    cpu_s: dict[str, float]
    thread_s: float
    others_s: float
    asleep_s: float
    queued_s: float | None

    @property
    def between_s(self) -> float:
        """CPU time of the thread outside of instructions: the executor's loop, the batch, the ledger."""
        return self.thread_s - sum(self.cpu_s.values())


def group_of(instruction: Instruction) -> str:
    if instruction.kind is Kind.START:
        return SUBMIT
    if instruction.kind is Kind.WAIT:
        return ARRIVED
    if instruction.phase == "U":
        return UPDATE
    return ROUTED if instruction.name in ROUTING else BLOCKS


class Watch:
    """Adds up what instructions take on the thread that runs them."""

    def __init__(self) -> None:
        self.cpu_ns: Counter[str] = Counter()
        self.asleep_ns = 0

    @contextmanager
    def __call__(self, instruction: Instruction) -> Iterator[None]:
        began_ns, began_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        yield
        cpu_ns = time.thread_time_ns() - began_cpu_ns
        group = group_of(instruction)
        self.cpu_ns[group] += cpu_ns
        if group == ARRIVED:
            self.asleep_ns += max(0, time.perf_counter_ns() - began_ns - cpu_ns)


def queued_ns() -> int | None:
    """For how long this thread was ready to run and had no core, since it began; None where nobody says."""
    try:
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None


def host_time(config: PretrainConfig, device: torch.device, *, steps: int) -> HostTime:
    """Of this rank, once `auto` has decided; all ranks call it together."""
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    runner = StepRunner(config, data, device=device)
    found: list[HostTime] = []
    searched = 0
    while runner.undecided and searched < MOST_SEARCH_STEPS:
        began_s = time.perf_counter()
        runner.compute(searched + 1)
        runner.adapt(time.perf_counter() - began_s)
        searched += 1
    for number in range(1, WARM_UP + steps + 1):
        all_gather_object(runner.mesh, None)
        watch = Watch() if number > WARM_UP else None
        runner.trainable.watch(watch)
        queued, process_ns, thread_ns, began_s = queued_ns(), time.process_time_ns(), time.thread_time_ns(), time.perf_counter()
        runner.compute(searched + number)
        step_s, thread_ns = time.perf_counter() - began_s, time.thread_time_ns() - thread_ns
        others_ns, now = time.process_time_ns() - process_ns - thread_ns, queued_ns()
        if watch is not None:
            cpu_s = {group: watch.cpu_ns[group] / 1e9 for group in GROUPS}
            waited = None if queued is None or now is None else (now - queued) / 1e9
            numbers = thread_ns / 1e9, others_ns / 1e9, watch.asleep_ns / 1e9, waited
            found.append(HostTime(len(runner.trainable.program), step_s, cpu_s, *numbers))
    runner.trainable.watch(None)
    runner.trainable.settle()
    runner.close()
    return median_of(found)


def median_of(found: Sequence[HostTime]) -> HostTime:
    """Number by number."""

    middle = statistics.median
    queued = [one.queued_s for one in found if one.queued_s is not None]
    return HostTime(
        instructions=found[0].instructions,
        step_s=middle([one.step_s for one in found]),
        cpu_s={group: middle([one.cpu_s[group] for one in found]) for group in found[0].cpu_s},
        thread_s=middle([one.thread_s for one in found]),
        others_s=middle([one.others_s for one in found]),
        asleep_s=middle([one.asleep_s for one in found]),
        queued_s=middle(queued) if queued else None,
    )


def mean_of(ranks: Sequence[HostTime]) -> HostTime:
    """Over ranks, number by number."""
    means = [one.queued_s for one in ranks if one.queued_s is not None]
    mean = statistics.fmean
    return replace(
        ranks[0],
        step_s=max(one.step_s for one in ranks),
        cpu_s={group: mean([one.cpu_s[group] for one in ranks]) for group in ranks[0].cpu_s},
        thread_s=mean([one.thread_s for one in ranks]),
        others_s=mean([one.others_s for one in ranks]),
        asleep_s=mean([one.asleep_s for one in ranks]),
        queued_s=mean(means) if means else None,
    )


def of_all_ranks(config: PretrainConfig, device: torch.device, *, steps: int) -> dict[str, Any]:
    """The mean, as JSON; all ranks call it together."""
    return asdict(mean_of(all_gather_object(build_mesh(), host_time(config, device, steps=steps))))


def overrides_of(ranks: int) -> dict[str, list[str]]:
    """What is run, by name: the ladder's model without an emulated device, its schedules, each also on next to nothing."""
    base = [
        *("experiment=ladder", "cluster.attention_ms=0", "cluster.experts_ms=0", f"launch.ranks={ranks}"),
        *(f"model.num_experts={max(2, ranks)}", f"parallel.ep={ranks}", f"train.global_batch_size={4 * ranks}"),
    ]
    tiny = ["model.d_model=8", "model.head_dim=2", "model.d_ff=8", "train.seq_len=8"]
    schedules = {
        "eager": ["strategy=eager"],
        "lina": ["strategy=lina", "strategy.packing=1"],
        "flow": ["strategy=flow"],
        "flow in 4": ["strategy=flow", "strategy.parts=4"],
        "auto": ["strategy=auto"],
    }
    full = {name: [*base, *own] for name, own in schedules.items()}
    return full | {f"{name}, {TINY}": [*words, *tiny] for name, words in full.items()}


def table(found: Mapping[str, HostTime]) -> str:
    """For people: milliseconds of a step, and microseconds per instruction that any host would pay."""
    head = ["strategy", "instructions", "step", *GROUPS, "between", "other threads", "asleep", "no core", "us per instruction"]
    rows = [head]
    for name, one in found.items():
        tiny = found.get(f"{name}, {TINY}")
        if tiny is None:
            continue
        numbers = [one.step_s, *(one.cpu_s[group] for group in GROUPS), one.between_s, one.others_s, one.asleep_s]
        queued = "-" if one.queued_s is None else f"{one.queued_s * 1e3:.1f}"
        each = f"{tiny.thread_s / tiny.instructions * 1e6:.0f}"
        rows.append([name, str(one.instructions), *(f"{s * 1e3:.1f}" for s in numbers), queued, each])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
