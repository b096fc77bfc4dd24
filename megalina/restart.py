"""A restart: what the next start of a job goes on from, when a rank of the last one was lost.

It is this job's newest checkpoint.  The settings of the first start may say something else (train.resume=PATH, train.init_from),
and the folder may hold older checkpoints, of higher steps even, from before it."""

from collections.abc import Callable
from pathlib import Path


def later_starts(checkpoints: Path, resume: str) -> Callable[[], tuple[str, str]]:
    """Called before the first start.  The function it returns gives what train.resume is in the next one, and says so.

    `checkpoints`: RUN/checkpoints.  `resume`: train.resume of the first start."""
    before = _folders(checkpoints)

    def next_start() -> tuple[str, str]:
        from megalina.checkpoint.files import is_complete  # seconds, which a job that loses no rank need not wait for

        there = _folders(checkpoints)
        complete = [path for path in there if is_complete(path)]
        own = [path for path in complete if before.get(path) != there[path]]
        if resume in ("auto", "verify", "none") or (own and max(complete) == max(own)):
            # Among damaged checkpoints it finds the one to take.  With `none` the folder had none: all are of this job.
            return "auto", f"from checkpoint {max(complete).name}" if complete else "from the beginning, without a checkpoint"
        if own:
            return str(max(own)), f"from checkpoint {max(own).name}"
        return resume, f"from {resume} again: there is no newer checkpoint yet"

    return next_start


def _folders(checkpoints: Path) -> dict[Path, tuple[int, int]]:
    """Each step's folder and what tells it from another one of the same name."""
    found = {path: path.stat() for path in checkpoints.glob("step_*") if path.name[5:].isdigit()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}
