"""Memory that a step frees stays with its process, so that the next step finds it there.

glibc's malloc takes large blocks from the system one by one, and gives each back as soon as it is free.  Each step then touches
all of its memory anew: tens of thousands of page faults, each of which the kernel answers with a page of zeros.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 2**31 - 1  # bytes; what an int holds


def keep_memory() -> bool:
    """From now on this process keeps what it has freed; False where its C library is not glibc, and nothing changes.

    Takes effect for blocks that are asked for from now on, in all of the process, and can't be undone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(what, MOST) == 1 for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
