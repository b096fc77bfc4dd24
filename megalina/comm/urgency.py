"""Urgency: threads that do a network card's work on a core that also does the math of an emulated device.

A real card doesn't wait for the math to let it have the core.  Linux gives a thread such a place only to root, which an
emulated cluster needs anyway; elsewhere nothing changes.
"""

import os
import threading
from contextlib import suppress


def other_threads_are_urgent() -> None:
    """All threads of this process but the calling one: gloo's, which move the bytes."""
    own = threading.get_native_id()
    for name in os.listdir("/proc/self/task"):
        if int(name) != own:
            _urgent(int(name))


def this_thread_is_urgent() -> None:
    """The calling thread: a lane's, which starts what waits for nothing any more."""
    _urgent(threading.get_native_id())


def _urgent(thread: int) -> None:
    with suppress(OSError):  # not permitted, or ended meanwhile
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
