"""Hydra's decorator reads sys.argv and reports to the process: here a program of Hydra becomes a function of its arguments."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


@contextmanager
def arguments_for_hydra(argv: Sequence[str] | None) -> Iterator[None]:
    """Within it Hydra reads `argv` (None: the process's own) and hands its errors on in place of printing them.

    What Hydra keeps for the process is fresh at the start, so that a process may run several commands one after another."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if argv is not None:
        sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
