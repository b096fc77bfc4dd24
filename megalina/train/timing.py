"""The timing of a run's steps: contention in every record, and the timelines of chosen steps as a trace and a picture."""

import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from megalina.comm.calibration import calibrate, fastest, sizes_of_step
from megalina.comm.slowdowns import slowdowns
from megalina.config import PretrainConfig
from megalina.layout import rows
from megalina.mesh import all_gather_object
from megalina.parallel.trainable import Trainable
from megalina.timeline import picture, trace
from megalina.timeline.contention import Alone, summary
from megalina.timeline.recorder import Event, Recorder
from megalina.train.run_state import Built

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

    def after(self, step: int, recorder: Recorder | None) -> dict[str, float | None]:
        """For the step's record: this rank's `Contention.as_metrics`, if they are wanted."""
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
        return summary(events, self._alone, of_group).as_metrics()

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
        everybody = all_gather_object(self._mesh, (events, machine()))
        if self._mesh.world.rank > 0:
            return
        by_rank = [of_rank for of_rank, _ in everybody]
        self._traced[step] = trace.TracedStep(by_rank, rows(self._mesh.shape), alone)
        offsets_s = trace.aligned(by_rank, [name for _, name in everybody])
        folder = Path(self._config.run.dir)
        note = emulation_note(self._built.trainable)
        try:
            trace.write_trace(folder / trace.FILE, self._traced, offsets_s, note)
            newest = list(self._traced.items())[-MOST_PICTURED:]
            timelines = {f"step {number}, rank 0": traced.by_rank[0] for number, traced in newest}
            picture.draw(folder / picture.FILE, timelines, note, race=False)
        except OSError as error:
            logger.warning("warning: the timeline of step %d could not be written: %s", step, error)


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
