"""The timing of a run's steps: contention in every record, and the timelines of chosen steps as a trace and a picture."""

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalina.comm.calibration import calibrate, fastest, sizes_of_step
from megalina.comm.slowdowns import slowdowns
from megalina.comm.stage_means import stage_means
from megalina.config import PretrainConfig
from megalina.mesh import all_gather_object
from megalina.parallel.trainable import Trainable
from megalina.step.pipeline.job import Pipelined, cells_by_tag
from megalina.timeline import picture, trace
from megalina.timeline.contention import Alone, Contention, summary
from megalina.timeline.recorder import Event, Recorder
from megalina.train.built import Built

CALIBRATIONS = 3  # after so many of the first recorded steps: a machine that is busy for a moment spoils not all of them
MOST_PICTURED = 8  # steps, the newest; the trace has all

logger = logging.getLogger("megalina")


class Timing:
    """All ranks call `recorder` before and `after` after each step.  Without `timeline.metrics` and `timeline.trace_steps` both
    do nothing.  After a repack it calibrates anew; what was traced stays."""

    def __init__(self, config: PretrainConfig, built: Built):
        self._config, self._built = config, built
        self._traced: dict[int, trace.TracedStep] = {}
        self._forget()

    def _forget(self) -> None:
        self._mesh = self._built.mesh  # for which it is calibrated
        self._alone: dict[str, Alone] = {}
        self._sizes_bytes: dict[str, list[int]] | None = None  # of the first step that was recorded
        self._calibrations = 0

    def recorder(self, step: int) -> Recorder | None:
        """For the step, and then for `after`; None where nothing is wanted of it."""
        timeline = self._config.timeline
        return Recorder() if timeline.metrics or step in timeline.trace_steps else None

    def after(self, step: int, recorder: Recorder | None) -> dict[str, Any]:
        """For the step's record: this rank's `Contention.as_metrics`, if they are wanted, and means of a pipeline's stages."""
        if recorder is None:
            return {}
        if self._mesh is not self._built.mesh:
            self._forget()
        events = recorder.events()
        if self._calibrations < CALIBRATIONS:
            self._calibrate(events)
        if step in self._config.timeline.trace_steps:
            self._trace(step, events, self._alone)
        if not self._config.timeline.metrics:
            return {}
        trainable = self._built.trainable
        of_group = slowdowns(self._mesh, trainable.log, trainable.program, events, self._alone)
        found = summary(events, self._alone, of_group)
        return found.as_metrics() | (self._of_stages(found) if self._mesh.pp > 1 else {})

    def _of_stages(self, found: Contention) -> dict[str, list[float]]:
        """Of each pipeline rank the mean over its ranks."""
        waits = [found.traffic[name].exposed_s if name in found.traffic else 0.0 for name in ("pp", "a2a")]
        means = stage_means(self._mesh, self._built.trainable.log, [found.idle_share, *waits])
        return dict(zip(("stage_idle_shares", "stage_pp_exposed_s", "stage_a2a_exposed_s"), means, strict=True))

    def _calibrate(self, events: list[Event]) -> None:
        """The same on every rank."""
        if self._sizes_bytes is None:
            self._sizes_bytes = sizes_of_step(self._mesh, events)
        sharded = self._config.parallel.zero == 1
        found = calibrate(self._mesh, self._built.trainable.log, self._sizes_bytes, sharded=sharded)
        self._alone = fastest(self._alone or found, found, self._sizes_bytes)
        self._calibrations += 1

    def _trace(self, step: int, events: list[Event], alone: Mapping[str, Alone]) -> None:
        """Rank 0 writes all steps that there are so far: a run may end early."""
        mesh, job = self._mesh, self._built.trainable.pipelined
        cells = {} if job is None else cells_by_tag(self._built.trainable.setting, job, mesh.pp_rank)
        along = {name: axis.ranks for name, axis in mesh.along_stages.items()}
        everybody = all_gather_object(mesh, (events, machine(), cells, along))
        if mesh.world.rank > 0:
            return
        by_rank = [of_rank for of_rank, *_ in everybody]
        groups: dict[str, Sequence[Sequence[int]]] = {**mesh.rows}
        for name in {name for *_, of_rank in everybody for name in of_rank}:
            groups[name] = sorted({of_rank[name] for *_, of_rank in everybody if name in of_rank})
        self._traced[step] = trace.TracedStep(
            by_rank,
            groups,
            alone,
            places=[] if job is None else [_place(job, rank * mesh.pp // len(by_rank)) for rank in range(len(by_rank))],
            cells=[] if job is None else [of_rank for _, _, of_rank, _ in everybody],
        )
        offsets_s = trace.aligned(by_rank, [name for _, name, *_ in everybody])
        folder = Path(self._config.run.dir)
        note = emulation_note(self._built.trainable)
        try:
            trace.write_trace(folder / trace.FILE, self._traced, offsets_s, note)
            picture.draw(folder / picture.FILE, self._pictured(), note, race=False)
        except OSError as error:
            logger.warning("warning: the timeline of step %d could not be written: %s", step, error)

    def _pictured(self) -> dict[str, Sequence[Event]]:
        """Of the newest steps rank 0, or the first rank of each stage."""
        stages = self._mesh.pp
        newest = list(self._traced.items())[-max(1, MOST_PICTURED // stages) :]
        ranks = range(0, self._mesh.world.size, self._mesh.world.size // stages)
        return {f"step {number}, rank {rank}": traced.by_rank[rank] for number, traced in newest for rank in ranks}


def _place(job: Pipelined, rank: int) -> str:
    """For people: "pipeline rank 1: stages 1 and 2"."""
    stages = job.pipeline.stages_of(rank)
    return f"pipeline rank {rank}: stage{'s' if len(stages) > 1 else ''} {' and '.join(map(str, stages))}"


def machine() -> str:
    """Whose clock this is: one kernel's processes share it, in containers too."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()


def emulation_note(trainable: Trainable) -> str:
    """What must stand on every figure of an emulated cluster, as tools/emulate_cluster.py tells its ranks; empty: it is real."""
    link_mbit, slowdown = (
        float(os.environ.get(f"MEGALINA_{name}", default)) for name, default in (("LINK_MBIT", 0), ("SLOWDOWN", 1))
    )
    told = {
        "emulated devices": trainable.device is not None,
        f"emulated links of {link_mbit:g} Mbit/s": link_mbit > 0,
        f"all times {slowdown:g}x dilated": slowdown != 1,
    }
    return ", ".join(words for words, is_so in told.items() if is_so)
