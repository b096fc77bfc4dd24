"""The files of a rank: what it leaves in RUN/logs and to torchrun, to explain why a job has ended."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

STOOD_STILL = 75  # exit code of a rank that ended because the job made no progress
UNSAVED = 74  # exit code of a rank whose last state could not be saved
REFUSED = 2  # exit code of a rank that ended with a ValueError: the configuration, data or checkpoint is no good


class Unsaved(RuntimeError):
    """A run's last state could not be saved: all ranks raise it alike, and the message says all there is to say."""


def traceback_path(logs: Path, rank: int) -> Path:
    """Why it ended, in its own words."""
    return logs / f"rank_{rank}.traceback"


def position_path(logs: Path, rank: int) -> Path:
    """The instruction that it was in; outlives a kill."""
    return logs / f"rank_{rank}.position"


def collectives_path(logs: Path, rank: int) -> Path:
    """The last collectives that it submitted; outlives a kill."""
    return logs / f"rank_{rank}.collectives"


def hang_path(logs: Path, rank: int) -> Path:
    """Its state when the job stood still."""
    return logs / f"hang_rank_{rank}.txt"


def files_of(logs: Path, rank: int) -> list[Path]:
    """All of them that may be there, its output included."""
    names = (traceback_path, position_path, collectives_path, hang_path)
    return [logs / f"rank_{rank}.log", *(name(logs, rank) for name in names)]


def tell_agent(line: str, environ: Mapping[str, str]) -> None:
    """Writes `line` for torchrun's agent that has started this rank; nothing where there is none.

    Its text is the root cause that the agent reports last.  The agent ends with a report and a traceback of its own whatever a
    rank does, so a mistake's line is not the very last one; but with this file the report says it.
    https://docs.pytorch.org/docs/stable/elastic/errors.html"""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # As torch's ErrorHandler writes it, whose import takes seconds.  The first of several ranks by this time is the root cause.
    told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
    with suppress(OSError), open(path, "w") as file:  # the line is on stderr as well
        json.dump({"message": told}, file)
