"""Urgent threads, which go before others of the same core.

Threads that do a network card's work on a core that also does the math of an emulated device are urgent: a real card doesn't wait
for the math to let it have the core.  So is the program's own thread while it hands a message to gloo, under a lock of the
connection: gloo's thread tries for that lock in a circle, and would keep the core from the lock's owner until the kernel steps
in, after a second.  Linux gives a thread such a place only to root, which an emulated cluster needs anyway; elsewhere nothing
changes.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def other_threads_are_urgent() -> None:
    """All threads of this process but the calling one: gloo's, which move the bytes."""
    own = threading.get_native_id()
    for name in os.listdir("/proc/self/task"):
        if int(name) != own:
            _urgent(int(name))


def this_thread_is_urgent() -> None:
    """The calling thread, one that starts what waits for nothing any more."""
    _urgent(threading.get_native_id())


@contextmanager
def urgent_meanwhile() -> Iterator[None]:
    """The calling thread, and afterwards what it was before."""
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    _urgent(0)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, param)


def _urgent(thread: int) -> None:
    with suppress(OSError):  # not permitted, or ended meanwhile
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
