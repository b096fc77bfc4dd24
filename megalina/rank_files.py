"""The files of a rank: what it leaves in RUN/logs for whoever asks why a job has ended."""

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
