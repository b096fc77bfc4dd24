"""Known sequences: whether samples can give all that a run will ask them for, asked before it starts."""

from collections.abc import Sequence

from megalina.data.source import Samples
from megalina.train.sample_windows import Window, after

MOST_ASKED = 16384  # sequences; of more the first ones are asked for


def check_known(samples: Samples, *, first: int, count: int, steps: int, windows: Sequence[Window]) -> None:
    """The sequences of so many steps of `count` each, from number `first` on; the samples' ValueError where they have one not."""
    for _ in range(min(steps, -(-MOST_ASKED // count))):
        first = after(first, count, windows)
        samples.batch(first, count)
        first += count
