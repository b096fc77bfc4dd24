"""The resume point: which checkpoint a run goes on from, and whether it is of the same run.

The newest is taken whose files are all as they were written.  What one process can see at no cost (small files, sizes)
is looked at before ranks start, the rest by all ranks together."""

from dataclasses import replace
from pathlib import Path

from megalina.changed_settings import check_changes
from megalina.checkpoint.checkpoints import Checkpoints, all_damaged
from megalina.checkpoint.checksums import damaged
from megalina.checkpoint.files import newest_first, read_values
from megalina.config import PretrainConfig


def resume_candidates(config: PretrainConfig) -> list[Path]:
    """The checkpoints to go on from, the best first, whole or not; none: start anew.

    ValueError where one is in the way of a run that is to start anew.  Needs no process group."""
    there = newest_first(Path(config.run.dir) / "checkpoints")
    if config.train.resume == "none":
        if there:
            raise ValueError(
                f"train.resume=none, but {config.run.dir} has a checkpoint of step {int(there[0].name[5:])}: "
                "choose another run.dir, remove its checkpoints, or go on with train.resume=auto"
            )
        return []
    return there if config.train.resume in ("auto", "verify") else named_checkpoints(Path(config.train.resume))


def named_checkpoints(path: Path) -> list[Path]:
    """The checkpoint that is named; of a run folder its checkpoints, the newest first."""
    return newest_first(path / "checkpoints") if (path / "checkpoints").is_dir() else [path]


def with_weights(config: PretrainConfig) -> PretrainConfig:
    """The configuration with the newest whole checkpoint of the run folder that train.init_from names; the same one where it
    names none.  ValueError where all are damaged."""
    path = Path(config.train.init_from)
    if not config.train.init_from or not (path / "checkpoints").is_dir():
        return config
    found = {candidate: damaged(candidate, tensors=False) for candidate in named_checkpoints(path)}
    start = next((candidate for candidate, reasons in found.items() if not reasons), None)
    if start is None:
        raise ValueError(all_damaged(found) if found else f"train.init_from={path} has no checkpoint yet")
    return replace(config, train=replace(config.train, init_from=str(start)))


def resume_point(config: PretrainConfig) -> Path | None:
    """The checkpoint to go on from, as far as one process can tell; None: start anew.

    Of the tensors' files only the sizes are looked at.  ValueError where there is none to be found or all are damaged,
    where one is in the way, and where the run can't go on from it, or not without a word (`megalina/changed_settings.py`): a
    run that silently goes on with other text has no name.  Needs no process group.
    """
    found = {}
    for path in resume_candidates(config):
        found[path] = damaged(path, tensors=False)
        if not found[path]:
            check_changes(path, read_values(path)["config"], config)
            return path
    if found:
        raise ValueError(all_damaged(found))
    return None


def agreed_resume_point(config: PretrainConfig, checkpoints: Checkpoints) -> Path | None:
    """As `resume_point`, with all files checked, each rank a share; all ranks call it and are given the same.

    Damaged checkpoints are passed over with a warning; ValueError as there."""
    point = checkpoints.first_good(resume_candidates(config))
    if point is not None:
        check_changes(point, read_values(point)["config"], config)
    return point
