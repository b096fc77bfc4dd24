"""Garbage is collected after the steps that the interval names, and nowhere else meanwhile."""

import gc
import weakref

import pytest

from megalina.train.garbage import Garbage


class Circle:
    def __init__(self) -> None:
        self.me = self


def test_circles_go_after_the_steps_of_the_interval() -> None:
    garbage = Garbage(interval=4)
    try:
        circle = weakref.ref(Circle())
        kept = [[] for _ in range(100_000)]  # more than the thresholds of any generation
        for step in range(5, 8):
            garbage.after(step)
            assert circle() is not None
        garbage.after(8)
        assert circle() is None and len(kept) == 100_000
    finally:
        garbage.close()
    assert gc.isenabled()


@pytest.mark.parametrize(("interval", "before"), [(0, True), (0, False), (3, False)])
def test_a_process_that_collects_nothing_or_everything_by_itself_stays_so(interval: int, before: bool) -> None:
    if not before:
        gc.disable()
    try:
        garbage = Garbage(interval=interval)
        assert gc.isenabled() == before
        garbage.close()
        assert gc.isenabled() == before
    finally:
        gc.enable()
