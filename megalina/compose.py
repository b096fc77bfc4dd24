"""compose(): the configuration that the command line would run with these overrides, for programs, tests and notebooks."""

from collections.abc import Sequence
from pathlib import Path

from megalina.config import PretrainConfig


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
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from megalina.worker import load_config

    register_schema()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return load_config(hydra.compose("pretrain", overrides=list(overrides)))
    finally:
        GlobalHydra.instance().hydra = outer  # of another instance: Hydra makes a new one
