"""Few garbage collections, where lists of ten thousands of instructions are made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 100_000  # between two collections


@contextmanager
def few_collections() -> Iterator[None]:
    """What was there before is not searched again and again, nor are lists while they grow; afterwards all is as it was."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
