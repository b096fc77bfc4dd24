"""Interleaved runs: several strategies train the same model on the same data in one job, taking turns step by step.

Each competitor has its own copy of weights and optimizer and walks through the same batches from the same start, so that
losses can be held against each other while times are taken.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megalina.blocks.dispatch import dispatch_of
from megalina.blocks.pipelined import pipelined
from megalina.collective_log import CollectiveLog
from megalina.comm.calibration import calibrate, fastest, sizes_of_step
from megalina.config import PretrainConfig
from megalina.data.source import TokenData
from megalina.layout import EMBEDDING, rows_across
from megalina.mesh import Mesh, all_gather_object, build_meshes
from megalina.parallel.meshes import sending_by_node, summing_by_node
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.timeline.contention import Alone
from megalina.timeline.recorder import Event, Recorder
from megalina.train.packing import allowed_packings
from megalina.train.step_runner import StepRunner

Layout = tuple[
    int, int, tuple[int, ...]
]  # stages, packing, ranks along the axes without packing and whether sums and tokens are by node
Given = tuple[str, str, int, int, int, int]  # parallel.reduce, how tokens are sent, tp, ep, cp, pp
MOST_SEARCH_STEPS = 300  # a strategy that still searches then is not what is to be measured
HOPEFUL = 1.03  # a variant of the baseline that is this much slower than its best in the first round takes no further turn
WORTHWHILE = 1.05  # nor does another strategy that is this much slower than it


@dataclass(slots=True)
class Competitor:
    """One strategy: its own copy of everything that a step changes, and what was measured on this rank."""

    name: str
    runner: StepRunner
    step_s: list[float] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)  # of all steps, timed or not
    events: list[list[Event]] = field(default_factory=list)  # of the timed steps
    peak_bytes: int = 0  # resident memory, above what was there before its turn
    search_steps: int = 0  # before it was measured
    busy_s: list[float] = field(default_factory=list)  # of the emulated device, in each timed step
    overrun_s: list[float] = field(default_factory=list)  # by which real math was late

    @property
    def losses(self) -> list[float]:
        return [result.loss for result in self.results]


def run_interleaved(
    configs: Mapping[str, PretrainConfig],
    data: TokenData,
    *,
    rounds: int,
    turn: int,
    baseline: str | None = None,
    to_the_end: Collection[str] = (),
    prepare: Callable[[str, StepRunner], None] = lambda name, runner: None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[Competitor]:
    """Rounds in which every competitor takes `turn` timed steps after one that is not timed; the order of turns rotates.

    All ranks call it together.  Before the first round each warms up, for as long as it searches.  Those named `baseline` and a
    word behind it are its variants: the hopeless ones stop after the first round, and so does whatever is clearly slower than the
    best of them, but for those that run `to_the_end`.  `prepare` may give a competitor weights to start from."""
    meshes, rank = _shared_meshes(list(configs.values())), dist.get_rank() if dist.is_initialized() else 0
    logs = {layout: CollectiveLog(rank, alike=layout[-1] == 1) for layout in meshes}

    def runner_of(config: PretrainConfig) -> StepRunner:
        shared = _given_layout(config)
        return StepRunner(config, data, device=torch.device("cpu"), meshes=meshes[shared], log=logs[shared])

    competitors = [Competitor(name, runner_of(config)) for name, config in configs.items()]
    for competitor in competitors:
        prepare(competitor.name, competitor.runner)
    gc.collect()
    gc.freeze()  # collections between turns need not walk through what stays until the end
    gc.disable()  # and one in a turn would slow the strategy whose turn it is
    done, going_on = 0, competitors
    try:
        for number in range(rounds + 1):
            at = number % len(going_on)
            total = done + (rounds + 1 - number) * len(going_on)
            for competitor in going_on[at:] + going_on[:at]:
                progress(done, total, competitor.name)
                _take_turn(competitor, turn, weigh=number == 1) if number else _warm_up(competitor)
                done += 1
            if number == 1 and baseline is not None:
                going_on = _without_hopeless(competitors, baseline, to_the_end)
    finally:
        gc.enable()
        gc.unfreeze()
    return competitors


def is_variant(name: str, baseline: str) -> bool:
    """Whether a competitor is the baseline, perhaps with other pieces: "eager" or "eager 512 KiB", but not "eager_plain"."""
    return name.partition(" ")[0] == baseline


def _given_layout(config: PretrainConfig) -> Given:
    parallel = config.parallel
    return parallel.reduce, dispatch_of(config).kind, parallel.tp, parallel.ep, parallel.cp, parallel.pp


def _shared_meshes(configs: Sequence[PretrainConfig]) -> dict[Given, Mapping[int, Mesh]]:
    """By layout, with all packings that any of these may take, and all axes between stages that any of their schedules
    needs.

    A group of its own for each competitor would be dozens more, with their connections and threads."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    packings: dict[Given, set[int]] = {}
    across: dict[Given, dict[str, tuple[int, ...]]] = {}
    per_node: dict[Given, tuple[int, int]] = {}
    for config in configs:
        layout = _given_layout(config)
        packings.setdefault(layout, set()).update(allowed_packings(config, world))
        if layout not in per_node:
            per_node[layout] = summing_by_node(config.parallel), sending_by_node(config)
        own = pipelined(config, world).across if config.parallel.pp > 1 else {}
        known = across.setdefault(layout, {})
        assert all(known.get(name, on) == on for name, on in own.items()), "two axes of one name"
        known |= own
    timeout_s = max(config.cluster.timeout_s for config in configs)
    return {
        layout: build_meshes(
            tp=layout[2],
            ep=layout[3],
            cp=layout[4],
            packings=sorted(of),
            pp=layout[5],
            across=across[layout],
            timeout_s=timeout_s,
            ranks_per_node=per_node[layout][0],
            token_ranks_per_node=per_node[layout][1],
        )
        for layout, of in packings.items()
    }


def layout_of(mesh: Mesh) -> Layout:
    """The same for meshes on which exchanges take the same time."""
    return mesh.pp, mesh.packing, (*mesh.unpacked.values(), int(mesh.sums_by_node), int(mesh.ep.nodes is not None))


def rows_along(trainable: Trainable) -> dict[str, list[list[int]]]:
    """The rows of global ranks along each axis of a competitor's mesh, those between stages among them."""
    mesh, job = trainable.mesh, trainable.pipelined
    across = {} if job is None else job.across
    between = {name: rows_across(mesh.shape, on, "dp" if name == EMBEDDING else "") for name, on in across.items()}
    return mesh.rows | between


def alone(competitors: Sequence[Competitor]) -> dict[Layout, dict[str, Alone]]:
    """By layout: how long the exchanges take that have the links to themselves, of the sizes of the first competitor's steps that
    came out with it.  All ranks call it together."""
    out: dict[Layout, dict[str, Alone]] = {}
    for competitor in competitors:
        runner = competitor.runner
        mesh, sharded = runner.mesh, runner.config.parallel.zero == 1
        layout = layout_of(mesh)
        if layout in out:
            continue
        sizes_bytes = sizes_of_step(mesh, competitor.events[-1])
        packed = [found for (pp, _, sizes), found in out.items() if (pp, sizes) == (layout[0], layout[2])]
        known = packed[0] if packed else {}  # packing changes those of tokens alone
        new = {op: sizes for op, sizes in sizes_bytes.items() if op == "tokens" or op not in known}
        first, second = (calibrate(mesh, runner.log, new, sharded=sharded) for _ in range(2))
        out[layout] = known | fastest(first, second, new)
    return out


def _without_hopeless(competitors: Sequence[Competitor], baseline: str, to_the_end: Collection[str]) -> list[Competitor]:
    """The same on every rank; all call it together."""
    everybody = all_gather_object(competitors[0].runner.mesh, {c.name: statistics.median(c.step_s) for c in competitors})
    slowest_s = {c.name: max(of_rank[c.name] for of_rank in everybody) for c in competitors}
    best_s = min((s for name, s in slowest_s.items() if is_variant(name, baseline)), default=math.inf)

    def goes_on(name: str) -> bool:
        limit = HOPEFUL if is_variant(name, baseline) else WORTHWHILE
        return name in to_the_end or slowest_s[name] <= limit * best_s

    return [c for c in competitors if goes_on(c.name)]


def _warm_up(competitor: Competitor) -> None:
    runner = competitor.runner
    _together(runner)
    _step(competitor)
    while runner.undecided and competitor.search_steps < MOST_SEARCH_STEPS:
        runner.adapt(_step(competitor))
        competitor.search_steps += 1


def _take_turn(competitor: Competitor, turn: int, *, weigh: bool) -> None:
    """`weigh`: find out how much memory it needs, too, which costs a second or two."""
    runner, device = competitor.runner, competitor.runner.trainable.device
    _together(runner)
    with PeakMemory() if weigh else nullcontext() as memory:
        for i in range(turn + 1):
            recorder = Recorder() if i > 0 else None
            busy_s, overrun_s = (device.busy_s, device.overrun_s) if device is not None else (0.0, 0.0)
            step_s = _step(competitor, recorder)
            if recorder is None:
                continue
            competitor.step_s.append(step_s)
            competitor.events.append(recorder.events())
            if device is not None:
                competitor.busy_s.append(device.busy_s - busy_s)
                competitor.overrun_s.append(device.overrun_s - overrun_s)
    if memory is not None:
        competitor.peak_bytes = memory.peak_bytes
    runner.trainable.settle()


def _step(competitor: Competitor, recorder: Recorder | None = None) -> float:
    """One step; returns how long it took here."""
    runner, started_s = competitor.runner, time.perf_counter()
    result, _ = runner.compute(runner.state.step + 1, record=recorder)
    step_s = time.perf_counter() - started_s
    competitor.results.append(result)
    return step_s


def _together(runner: StepRunner) -> None:
    gc.collect()
    all_gather_object(runner.mesh, None)  # nobody starts before the last one is there


class PeakMemory:
    """The most resident memory inside of it, above what was there at the start; 0 where the kernel doesn't tell."""

    peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier turns have freed
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_bytes = max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
