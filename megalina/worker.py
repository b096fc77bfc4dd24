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

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from megalina.config import PretrainConfig
from megalina.console import StatusLine, command
from megalina.credentials import text_values
from megalina.rank_files import REFUSED, UNSAVED, Unsaved, traceback_path
from megalina.whole_file import write_whole

Train = Callable[[PretrainConfig], dict[str, Any]]


def load_config(source: str | DictConfig) -> PretrainConfig:
    """The configuration in a YAML text, or in what Hydra composed by our schema; every reference in it resolved.

    omegaconf's errors for unknown keys and wrong types, ValueError for what isn't such a text at all."""
    try:
        if isinstance(source, str):
            return _checked(OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.create(source)))
        try:
            return _checked(source)
        except AttributeError:  # a key that isn't in the schema was added to it: to be told by its name
            return load_config(OmegaConf.to_yaml(source))
    except (yaml.YAMLError, OverflowError, RecursionError, TypeError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split("full_key")[0].split()) or "it has no keys"
        raise ValueError(f"the configuration can't be read: {reason}") from error


def _checked(typed: DictConfig | ListConfig) -> PretrainConfig:
    config = OmegaConf.to_object(typed)
    assert isinstance(config, PretrainConfig)
    for key, value in text_values(config).items():
        if "${" in value:  # the next one who reads it would resolve it, when nobody looks at it any more
            raise ValueError(f"{key} is still a reference after it was resolved: take the backslashes away")
    return config


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json with its one line; a number that isn't finite becomes null, as JSON has none."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    write_whole(run_dir / "summary.json", json.dumps(finite, allow_nan=False) + "\n")


def work(config: PretrainConfig, train: Train) -> dict[str, Any]:
    """Trains on this rank; rank 0 writes the summary."""
    summary = train(config)
    if os.environ["RANK"] == "0":
        write_summary(Path(config.run.dir), summary)
    return summary


def main(arguments: list[str], train: Train) -> int:
    """The rank's process under our own launcher, which shows the traceback of the rank that failed first.

    `arguments`: the path of config.yaml, and in a start after the first one what train.resume is now."""
    path, *resume = arguments
    faulthandler.enable()
    try:
        config = load_config(Path(path).read_text())
        if resume:
            config.train.resume = resume[0]
        work(config, train)
    except Exception as error:  # noqa: BLE001  the launcher shows it
        unsaved = isinstance(error, Unsaved)
        text = str(error) if unsaved else traceback.format_exc()
        try:
            traceback_path(Path(path).parent / "logs", int(os.environ["RANK"])).write_text(text)
        except OSError:  # a disk that is full to the last byte
            print(text, file=sys.stderr)
        return UNSAVED if unsaved else REFUSED if isinstance(error, ValueError) else 1
    return 0


def _train(config: PretrainConfig) -> dict[str, Any]:
    line = StatusLine()
    if os.environ["RANK"] == "0":
        line.show(f"starting {os.environ['WORLD_SIZE']} rank(s): importing torch ...")
    try:
        # Imported here so that a failure of the import is reported like any other.
        from megalina.train.trainer import train
    finally:
        line.end()
    return train(config)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:], _train))
