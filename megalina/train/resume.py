"""The resume point: which checkpoint a run goes on from, and whether it is of the same run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalina.checkpoint.checkpoints import read_values
from megalina.checkpoint.files import is_complete
from megalina.config import PretrainConfig

# What makes another run of it: other numbers, or other data.  Everything else may change (layout, length, learning rate).
SAME = ("model", "router", "data", "train.seed", "train.seq_len", "optim.name")
FREE = ("model.name", "data.cache_dir", "data.tokenizer", "data.skip_samples")


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in RUN/checkpoints, if there is one."""
    return max((p for p in folder.glob("step_*") if p.name[5:].isdigit() and is_complete(p)), default=None)


def resume_point(config: PretrainConfig) -> Path | None:
    """The checkpoint to go on from; None: start anew.

    ValueError where there is none to be found, where one is in the way, and where it is of a run with another model or
    other data: a run that silently goes on with other text has no name.  Needs no process group.
    """
    newest = newest_checkpoint(Path(config.run.dir) / "checkpoints")
    if config.train.resume == "none":
        if newest is not None:
            raise ValueError(
                f"train.resume=none, but {config.run.dir} has a checkpoint of step {read_values(newest)['step']}: "
                "choose another run.dir, remove its checkpoints, or go on with train.resume=auto"
            )
        return None
    point = newest if config.train.resume in ("auto", "verify") else Path(config.train.resume)
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
