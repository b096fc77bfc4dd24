"""Python's garbage, collected between steps and at the same steps on all ranks.

Left to itself each rank collects when its own count of objects says so, in the middle of a step, and all others wait for it at
the next collective.  Megatron-LM's `--manual-gc` and torchtitan's `gc_freq` do the same.
"""

import gc


class Garbage:
    """From its making until `close` Python collects nothing by itself; with `interval` 0 it goes on, and this does nothing."""

    def __init__(self, *, interval: int):
        """`interval`: steps between collections."""
        self._interval = interval
        self._was_on = gc.isenabled()
        if interval:
            gc.disable()

    def after(self, step: int) -> None:
        """Between two steps, of which this one is over."""
        if self._interval and step % self._interval == 0:
            gc.collect(1)  # what is older has outlived a collection: walking through all of it takes longer than a step may

    def close(self) -> None:
        if self._interval and self._was_on:
            gc.enable()
