"""An emulated device for modules of other frameworks: their blocks take the time that they take on the device.

Autograd asks for blocks one after the other, so a block that would still be computing sleeps until the device would be done.
Whatever the host did since the last block or exchange is hidden under the next block, as on a GPU whose host runs ahead.  In the
frameworks' favour: gradients of a block's weights may leave as soon as the real math is done, before the device would be.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Event = Callable[[], None]


def nothing() -> None:
    pass


class Pace:
    def __init__(self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep):
        self._clock, self._sleep = clock, sleep
        self._free_s = clock()
        self.busy_s = 0.0
        self.overrun_s = 0.0  # by which the real math was late

    def waited(self) -> None:
        """An exchange has ended, or a step begins: what comes next begins now."""
        self._free_s = self._clock()

    def computed(self, seconds: float) -> None:
        """A block that takes so long on the device was computed here."""
        end_s, now_s = self._free_s + seconds, self._clock()
        self.busy_s += seconds
        if now_s < end_s:
            self._sleep(end_s - now_s)
        else:
            self.overrun_s += now_s - end_s
        self._free_s = max(end_s, now_s)

    def block(self, seconds: float) -> Event:
        return lambda: self.computed(seconds)


class Paced(nn.Module):
    """A module that takes `seconds` forward and twice as long backward; `exchanged`: what it reads, and its output's gradient,
    come off the wire."""

    def __init__(self, inner: nn.Module, pace: Pace, seconds: float, *, exchanged: bool = False):
        super().__init__()
        self.inner, self._pace, self._seconds = inner, pace, seconds
        self._arrived = pace.waited if exchanged else nothing

    def forward(self, x: Tensor) -> Tensor:
        pace, seconds = self._pace, self._seconds
        y: Tensor = self.inner(at(x, forward=self._arrived, backward=pace.block(2 * seconds)))
        return at(y, forward=pace.block(seconds), backward=self._arrived)


def at(x: Tensor, *, forward: Event = nothing, backward: Event = nothing) -> Tensor:
    """`x`, and something that happens when a forward pass, or its gradient in a backward pass, gets here."""
    return _At.apply(x, forward, backward)


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Event, backward: Event) -> Tensor:
        ctx.backward = backward
        forward()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        ctx.backward()
        return dx, None, None
