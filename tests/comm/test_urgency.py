"""Threads of the network go before the math, where that is permitted; where it isn't, nothing happens."""

import os
import threading
from collections.abc import Callable

import pytest

from megalina.comm.urgency import other_threads_are_urgent, this_thread_is_urgent, urgent_meanwhile


def policies(change: Callable[[], None], *, inside: bool) -> tuple[int, int]:
    """Of this thread and of another one, after `change` was called here, or inside of the other one."""
    ready, done, seen = threading.Event(), threading.Event(), list[int]()

    def other() -> None:
        if inside:
            change()
        ready.set()
        done.wait(5.0)
        seen.append(os.sched_getscheduler(threading.get_native_id()))

    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(5.0)
    if not inside:
        change()
    done.set()
    thread.join()
    return os.sched_getscheduler(threading.get_native_id()), seen[0]


@pytest.mark.parametrize("inside", [False, True])
def test_only_threads_of_the_network_are_urgent(inside: bool) -> None:
    change = this_thread_is_urgent if inside else other_threads_are_urgent
    permitted = os.geteuid() == 0
    assert policies(change, inside=inside) == (os.SCHED_OTHER, os.SCHED_RR if permitted else os.SCHED_OTHER)


def test_a_thread_is_urgent_meanwhile() -> None:
    """Also where an error ends it."""
    with pytest.raises(KeyError), urgent_meanwhile():
        within = os.sched_getscheduler(0)
        raise KeyError
    assert within == (os.SCHED_RR if os.geteuid() == 0 else os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_where_it_is_not_permitted_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert policies(this_thread_is_urgent, inside=True) == (os.SCHED_OTHER, os.SCHED_OTHER)
    with urgent_meanwhile():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
