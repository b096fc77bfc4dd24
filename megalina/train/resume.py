"""The resume point: which checkpoint a run goes on from, and whether it is of the same run.

The newest is taken whose files are all as they were written.  What one process can see at no cost (small files, sizes)
is looked at before ranks start, the rest by all ranks together."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalina.checkpoint.checkpoints import Checkpoints, all_damaged
from megalina.checkpoint.checksums import damaged
from megalina.checkpoint.files import newest_first, read_values
from megalina.config import PretrainConfig

# What makes another run of it: other numbers, or other data.  Everything else may change (layout, length, learning rate).
SAME = ("model", "router", "data", "train.seed", "train.seq_len", "optim.name")
FREE = ("model.name", "data.cache_dir", "data.tokenizer", "data.skip_samples")


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
    return there if config.train.resume in ("auto", "verify") else [Path(config.train.resume)]


def resume_point(config: PretrainConfig) -> Path | None:
    """The checkpoint to go on from, as far as one process can tell; None: start anew.

    Of the tensors' files only the sizes are looked at.  ValueError where there is none to be found or all are damaged,
    where one is in the way, and where it is of a run with another model or other data: a run that silently goes on with
    other text has no name.  Needs no process group.
    """
    found = {}
    for path in resume_candidates(config):
        found[path] = damaged(path, tensors=False)
        if not found[path]:
            check_same_run(path, read_values(path)["config"], config)
            return path
    if found:
        raise ValueError(all_damaged(found))
    return None


def agreed_resume_point(config: PretrainConfig, checkpoints: Checkpoints) -> Path | None:
    """As `resume_point`, with all files checked, each rank a share; all ranks call it and are given the same.

    Damaged checkpoints are passed over with a warning; ValueError as there."""
    point = checkpoints.first_good(resume_candidates(config))
    if point is not None:
        check_same_run(point, read_values(point)["config"], config)
    return point


def check_same_run(path: Path, saved: dict[str, Any], config: PretrainConfig) -> None:
    """ValueError that names the first settings that differ between the checkpoint's run and this one."""
    before, now = _flat(saved), _flat(asdict(config))
    watched = [k for k in now if any(k == s or k.startswith(s + ".") for s in SAME) and k not in FREE]
    different = [f"{k}={before.get(k)} there, {now[k]} here" for k in watched if before.get(k) != now[k]]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"checkpoint {path} is of another run ({'; '.join(different[:3])}{more}): "
            "use the same settings, another run.dir, or train.init_from to start anew from its weights"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
