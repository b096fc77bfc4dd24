"""A worker: one rank's process, from the run folder's config.yaml through the trainer to summary.json."""

import faulthandler
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megalina.config import PretrainConfig
from megalina.launch import traceback_path

Train = Callable[[PretrainConfig], dict[str, Any]]


def load_config(text: str) -> PretrainConfig:
    """The configuration in the YAML `text`; omegaconf's errors for unknown keys and wrong types."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.create(text)))
    assert isinstance(config, PretrainConfig)
    return config


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json with its one line; a number that isn't finite becomes null, as JSON has none."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    part = run_dir / ".summary.json.part"
    part.write_text(json.dumps(finite, allow_nan=False) + "\n")
    part.replace(run_dir / "summary.json")


def work(config: PretrainConfig, train: Train) -> dict[str, Any]:
    """Trains on this rank; rank 0 writes the summary."""
    summary = train(config)
    if os.environ["RANK"] == "0":
        write_summary(Path(config.run.dir), summary)
    return summary


def main(arguments: list[str], train: Train) -> int:
    """The rank's process under our own launcher, which shows the traceback of the rank that failed first."""
    path = Path(arguments[0])
    faulthandler.enable()
    try:
        work(load_config(path.read_text()), train)
    except Exception:  # noqa: BLE001  the launcher shows it
        traceback_path(path.parent / "logs", int(os.environ["RANK"])).write_text(traceback.format_exc())
        return 1
    return 0


def _train(config: PretrainConfig) -> dict[str, Any]:
    # Imported here so that a failure of the import is reported like any other.
    from megalina.train.trainer import train

    return train(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], _train))
