"""An emulated device that serves: its time follows what a batch asks of it, its tokens and the rows that came to its experts."""

from collections.abc import Callable

from megalina.parallel.emulated_device import EmulatedDevice
from megalina.step.program import Instruction


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
