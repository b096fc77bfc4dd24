"""Hydra's decorator reads sys.argv and reports to the process: here a program of Hydra becomes a function of its arguments.

Its --help comes in half the time: Hydra copies its configuration for every group that it lists."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from string import Template

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict, read_write

from megalina.compose import CONF

ASKED = ("--help", "-h")


@contextmanager
def arguments_for_hydra(argv: Sequence[str] | None) -> Iterator[None]:
    """Within it Hydra reads `argv` (None: the process's own) and hands its errors on in place of printing them.

    What Hydra keeps for the process is fresh at the start, so that a process may run several commands one after another."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if argv is not None:
        sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def show_help(config_name: str, arguments: Sequence[str]) -> bool:
    """Prints what Hydra would and returns True, if it is asked for with nothing but overrides beside it; else Hydra answers."""
    overrides = [word for word in arguments if word not in ASKED]
    if len(overrides) == len(arguments) or any(word.startswith("-") for word in overrides):
        return False
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
    template = Template(config.hydra.help.template)
    with read_write(config), open_dict(config):
        del config["hydra"]
    print(template.substitute(APP_CONFIG_GROUPS=_groups(), CONFIG=OmegaConf.to_yaml(config)))
    return True


def _groups() -> str:
    """A line for each folder of conf/: its files are the group's options."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir())
    options = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in folders}
    return "".join(f"{name}: {', '.join(words)}\n" for name, words in options.items() if words)
