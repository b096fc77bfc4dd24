"""The --help of a program of Hydra, in half the time: Hydra copies its configuration for every group that it lists."""

from collections.abc import Sequence
from string import Template

import hydra
from omegaconf import OmegaConf, open_dict, read_write

from megalina.compose import CONF

ASKED = ("--help", "-h")


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
