"""The spike guard: says whether a step's loss has jumped away from the last ones.

A robust z-score (Iglewicz and Hoaglin, 1993): the distance from the median of a window of losses, over 1.4826 times the
median distance from it, which for normal values is their standard deviation.  One bad value moves neither.
"""

import statistics
from collections import deque
from collections.abc import Sequence

from megalina.config import GuardConfig


class SpikeGuard:
    """Knows the losses of the last `guard.window` updates.  All ranks see the same losses, so all judge alike."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)

    def is_spike(self, loss: float) -> bool:
        """Never with `guard.spike=none`, and not before a quarter of the window is there."""
        return self.config.spike != "none" and self.rise(loss) > self.config.min_rise and self.score(loss) > self.config.threshold

    def rise(self, loss: float) -> float:
        """Nats above the median; 0 while there are too few losses to say."""
        if len(self._losses) < max(2, self.config.window // 4):
            return 0.0
        return loss - statistics.median(self._losses)

    def score(self, loss: float) -> float:
        """Robust standard deviations above the median; 0 while there are too few losses to say."""
        if len(self._losses) < max(2, self.config.window // 4):
            return 0.0
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self._losses)
        return (loss - median) / max(deviation, 1e-12)

    def accept(self, loss: float) -> None:
        """The loss of a step whose update was made."""
        self._losses.append(loss)

    def state(self) -> list[float]:
        return list(self._losses)

    def load(self, losses: Sequence[float]) -> None:
        self._losses = deque(losses, maxlen=self.config.window)
