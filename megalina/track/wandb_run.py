"""A W&B run: writes records to Weights & Biases, offline or online."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import wandb

from megalina.config import WandbConfig
from megalina.track.expert_load import LoadHistory, layer_numbers
from megalina.track.metrics import read_metrics, scalars


def run_id(run_dir: Path) -> str:
    """The id in RUN_DIR/wandb_id, made and stored there if the run has none yet: a run that continues is one W&B run."""
    path = run_dir / "wandb_id"
    if path.exists() and (stored := path.read_text(encoding="ascii").strip()):
        return stored
    fresh = secrets.token_hex(4)
    path.write_text(fresh + "\n", encoding="ascii")
    return fresh


class WandbRun:
    def __init__(self, config: WandbConfig, *, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        """Offline: half a second.  Online: at most 90 s, then wandb raises; ValueError if this machine has no key."""
        if config.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ValueError("mode=online has no key: set WANDB_API_KEY or run `wandb login`, or use tracker.wandb.mode=offline")
        self._run = wandb.init(
            project=config.project,
            group=config.group or None,
            tags=config.tags or None,
            name=config.name or run_dir.resolve().name,
            id=run_id(run_dir),
            resume="allow",
            mode="online" if config.mode == "online" else "offline",
            dir=run_dir,
            config=dict(run_config),
            # the console belongs to the progress bar and the last line of stdout; finish_timeout also bounds wandb's exit hook
            settings=wandb.Settings(console="off", silent=True, finish_timeout=60.0),
        )
        # wandb's own step restarts at 0 when a run continues offline, so ours is the x axis
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def folder(self) -> Path:
        return Path(self._run.dir).parent

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        self._run.log({"step": step} | {name: wandb.Image(picture) for name, picture in pictures.items()})

    def expert_load(self, history: LoadHistory, layer_numbers: list[int], picture: np.ndarray) -> None:
        """The map of the whole run, and its newest snapshot as a table of layer, expert, share."""
        rows = [
            [number, expert, float(share)]
            for number, layer in zip(layer_numbers, history.share_TLE[-1], strict=True)
            for expert, share in enumerate(layer)
        ]
        table = wandb.Table(columns=["layer", "expert", "load"], data=rows)
        self._run.log({"step": history.steps[-1], "expert_load": wandb.Image(picture), "expert_load_table": table})

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def rebuild(config: WandbConfig, *, run_dir: Path, run_config: Mapping[str, Any]) -> Path:
    """Log RUN_DIR/metrics.jsonl into a new offline run of the same id; returns its folder.

    The run's earlier folders are moved to RUN_DIR/wandb_replaced: of one id, only one may be uploaded.
    """
    records = read_metrics(run_dir / "metrics.jsonl")
    if not records:
        raise ValueError(f"{run_dir}/metrics.jsonl holds no step to rebuild from")
    for old in sorted((run_dir / "wandb").glob("*run-*")):
        if old.is_symlink():
            old.unlink()
        else:
            replaced = run_dir / "wandb_replaced"
            replaced.mkdir(exist_ok=True)
            old.rename(_free_name(replaced / old.name))
    run = WandbRun(config, run_dir=run_dir, run_config=run_config)
    for record in records:
        run.log(record["step"], scalars(record, lambda count: layer_numbers(run_config["model"], count)))
    run.finish(failed=False)
    return run.folder


def _free_name(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name}.{number}")
    return path
