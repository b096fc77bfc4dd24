"""compose(): the configuration that the command line would run with these overrides, for programs, tests and notebooks."""

import copy
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megalina.config import PretrainConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

VALUE = re.compile(r"(?!hydra\.)\w+(\.\w+)+=")  # an override that sets a value, and chooses no file of a group


def conf_folder() -> Path:
    """Where the YAML files are: in the package once it is installed from a wheel, else at the top of the repository."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


CONF = conf_folder()


def register_schema() -> None:
    """Makes `schema` in the defaults of conf/pretrain.yaml mean PretrainConfig, so that Hydra refuses unknown keys and types."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        store.store(name="schema", node=PretrainConfig)


def compose(overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of `pretrain_gpt_moe.py OVERRIDES`: typed, every reference resolved, but not yet checked.

    An error of Hydra or OmegaConf for an override that means nothing, ValueError for what isn't a configuration.  May be called
    within a program of Hydra, whose own state is left as it was."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from megalina.worker import load_config

    values = [text for text in overrides if VALUE.match(text)]
    others = tuple(text for text in overrides if not VALUE.match(text))
    if any(text.startswith(("+", "~")) for text in others):
        return load_config(_composed(tuple(overrides)))
    # Values are set after groups have been chosen: most of the time goes into the latter, which is done once for many calls.
    config = copy.deepcopy(_kept(others, _fingerprint()))
    try:
        for override in OverridesParser.create().parse_overrides(values):
            if override.is_sweep_override():
                return load_config(_composed(tuple(overrides)))
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException):
        return load_config(_composed(tuple(overrides)))  # Hydra's own words
    return load_config(config)


def _fingerprint() -> tuple[tuple[str, int], ...]:
    """Of all files in conf/: what was composed before one was changed is not given out again."""
    return tuple((entry.path, entry.stat().st_mtime_ns) for folder in (CONF, *_folders()) for entry in os.scandir(folder))


def _folders() -> list[Path]:
    return [path for path in CONF.iterdir() if path.is_dir()]


@lru_cache(maxsize=64)
def _kept(overrides: tuple[str, ...], fingerprint: tuple[tuple[str, int], ...]) -> "DictConfig":
    return _composed(overrides)


def _composed(overrides: tuple[str, ...]) -> "DictConfig":
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register_schema()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("pretrain", overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = outer  # of another instance: Hydra makes a new one
