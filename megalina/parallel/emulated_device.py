"""An emulated device: instructions take the time that they would take on another device, while the real math is done here.

It is asynchronous, as a GPU is: an instruction adds its time to the moment at which the device is free, and the host goes on.
What is sent leaves when the device is ready (the lanes wait for that), and a rank sleeps only where its program waits.  So many
ranks fit on few cores, and an idle device's time is not given to a busy one.
"""

import time
from collections.abc import Callable, Mapping

from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_seconds import SMALLEST_SHARE as SMALLEST_SHARE
from megalina.perfmodel.cost.instruction_seconds import emulated_seconds
from megalina.step.program import BucketSpec, Instruction


class EmulatedDevice:
    """`seconds(instruction)`: how long the device takes for a compute instruction; 0: as long as the host does."""

    def __init__(self, seconds: Callable[[Instruction], float]):
        self.seconds = seconds
        self.free_s = 0.0  # the moment at which all that was asked for is done
        self.busy_s = 0.0
        self.overrun_s = 0.0  # by which the real math ended later than the device would have

    def ran(self, instruction: Instruction, began_s: float, ended_s: float) -> tuple[float, float]:
        """An instruction's real math was done between these moments; returns when the device begins and ends it."""
        seconds = self.seconds(instruction)
        start_s = max(self.free_s, began_s)
        end_s = start_s + seconds
        if seconds > 0:
            self.busy_s += seconds
            self.overrun_s += max(0.0, ended_s - end_s)
        self.free_s = max(end_s, ended_s)
        return start_s, self.free_s

    def synchronize(self) -> None:
        """Sleep until the device is free."""
        if (early_s := self.free_s - time.perf_counter()) > 0:
            time.sleep(early_s)


def emulated_device(config: PretrainConfig, buckets: Mapping[str, BucketSpec] | None = None) -> EmulatedDevice | None:
    """The device that `cluster` asks for; None where it asks for none.  `buckets`: of a training step, for the time that
    directions of their matrices take."""
    seconds = emulated_seconds(config, buckets)
    return None if seconds is None else EmulatedDevice(seconds)


class ServingDevice(EmulatedDevice):
    """`seconds_of(instruction, tokens, rows)`: tokens of this rank's batch; rows that the experts of the instruction, or of the
    last one that had any, have here: of their layer, and of their chunk."""

    def __init__(self, seconds_of: Callable[[Instruction, int, int], float]):
        super().__init__(self._seconds)
        self._seconds_of = seconds_of
        self._tokens: int | None = None
        self._rows = 0

    def begin(self, tokens: int | None) -> None:
        """A batch of so many tokens starts; None: one for which the device takes no longer than the host."""
        self._tokens, self._rows = tokens, 0

    def give(self, rows: int) -> None:
        """So many rows came to the experts that are computed now."""
        self._rows = rows

    def _seconds(self, instruction: Instruction) -> float:
        return 0.0 if self._tokens is None else self._seconds_of(instruction, self._tokens, self._rows)
