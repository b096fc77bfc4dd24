"""Groups of ranks that talk to each other: the standard backend's, or on CPU gloo's, all on one thread that moves bytes.

A gloo group of its own has a thread that wakes up a hundred times a second, whether it has anything to do or not.  A mesh with
packing has dozens of groups, and where ranks share cores, as on a laptop, the threads of groups that sleep cost more than the
math: eight ranks on two cores take a third longer for a step.
"""

import functools
import os
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

GLOO = "gloo_of_one_thread"  # the name under which torch.distributed knows it


def new_group(ranks: Sequence[int], *, timeout: timedelta | None = None, gloo: bool = False) -> dist.ProcessGroup:
    """A group of these ranks; all ranks of the job call it, in the same order.  `gloo`: whatever the world's backend is."""
    if not gloo and dist.get_backend() != "gloo":
        return dist.new_group(list(ranks), timeout=timeout)
    if GLOO not in dist.Backend.backend_list:
        dist.Backend.register_backend(GLOO, _gloo, devices=["cpu"])
    return dist.new_group(list(ranks), timeout=timeout, backend=GLOO)


def is_gloo(group: dist.ProcessGroup | None) -> bool:
    """Whether this group's bytes are moved by gloo."""
    return dist.get_backend(group) in (GLOO, "gloo")


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = _devices()
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


@functools.cache
def _devices() -> list[dist.ProcessGroupGloo.Device]:
    """This process's, one for each interface that GLOO_SOCKET_IFNAME names; chosen as a group of its own would."""
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    gloo = dist.ProcessGroupGloo
    return [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]
