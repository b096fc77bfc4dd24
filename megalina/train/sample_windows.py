"""Sample windows: ranges of training sequences, by number, that a run passes over."""

from collections.abc import Sequence

Window = tuple[int, int]  # first, stop


def pairs(ends: Sequence[int]) -> list[Window]:
    """`data.skip_samples` as windows."""
    return list(zip(ends[::2], ends[1::2], strict=True))


def after(first: int, count: int, windows: Sequence[Window]) -> int:
    """Where the next `count` sequences start that touch no window, at or after `first`.

    A batch that would reach into a window starts behind it: sequences between its start and the window are passed over too.
    """
    for start, stop in sorted(windows):
        if first < stop and first + count > start:
            first = stop
    return first
