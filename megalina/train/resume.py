"""The resume point: which checkpoint a run goes on from, and what is known of it without a process group."""

from pathlib import Path

from megalina.config import PretrainConfig
from megalina.train.checkpoint import read_values
from megalina.train.checkpoint_files import is_complete


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in RUN/checkpoints, if there is one."""
    return max((p for p in folder.glob("step_*") if p.name[5:].isdigit() and is_complete(p)), default=None)


def resume_point(config: PretrainConfig) -> Path | None:
    """The checkpoint to go on from; None: start anew.  ValueError where there is none to be found, or one in the way."""
    newest = newest_checkpoint(Path(config.run.dir) / "checkpoints")
    if config.train.resume == "auto":
        return newest
    if config.train.resume != "none":
        read_values(Path(config.train.resume))
        return Path(config.train.resume)
    if newest is not None:
        raise ValueError(
            f"train.resume=none, but {config.run.dir} has a checkpoint of step {read_values(newest)['step']}: "
            "choose another run.dir, remove its checkpoints, or go on with train.resume=auto"
        )
    return None
