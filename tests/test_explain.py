"""Mistakes in our own words: what is wrong, in which argument, and what to type instead; nothing of Hydra's shows through."""

import errno
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalina.config import PretrainConfig
from megalina.explain import CONF, explain, no_such_setting, settings
from megalina.worker import load_config

ConfigStore.instance().store(name="schema", node=PretrainConfig)
THEIRS = re.compile(
    r"DictConfig|ListConfig|Optional|full_key|hydra\.cc|<EOF>|expecting|provider=|LexerNo|Traceback|Interpolation"
)


def told(*arguments: str, config: str = "pretrain") -> str:
    """What is said of a command line with these arguments."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            load_config(OmegaConf.to_yaml(compose(config, overrides=list(arguments)), resolve=True))
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        line = explain(error, list(arguments))
        assert "\n" not in line and not THEIRS.search(line), line
        return line
    return "nothing"


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("train.steps=null", "train.steps=null: train.steps needs a value; leave it out for its default"),
        ("train.steps=abc", "train.steps=abc must be a whole number"),
        ("train.steps={a:1}", "train.steps={a:1} must be a whole number"),
        ("optim.lr=fast", "optim.lr=fast must be a number"),
        ("model.bias=maybe", "model.bias=maybe must be true or false"),
        ("timeline.trace_steps=3", "timeline.trace_steps=3 must be a list, such as [1,2]"),
        ("train=3", "train=3: train is a group of settings, give one of them: train.steps=VALUE"),
        (
            "~model.bias",
            "~model.bias: a setting can't be taken out; leave it out for its default, or give it a value: model.bias=VALUE",
        ),
        ("~nosuch", "~nosuch: there is no setting nosuch; see --help"),
        ("~model.bia", "~model.bia: there is no setting model.bia (did you mean model.bias?); see --help"),
        (
            "+model=gpt2_moe",
            "+model=gpt2_moe: model has a file already; take another one with model=NAME, without the +",
        ),
        ("train.steps=${foo}", "train.steps=${foo}: train.steps refers to foo, and there is no setting foo; see --help"),
        ("run.dir=a=b", """run.dir=a=b: such characters in a value must be in quotes of their own: 'run.dir="a=b"'"""),
        ("run.dir=a b(c", """run.dir=a b(c: such characters in a value must be in quotes of their own: 'run.dir="a b(c"'"""),
        (
            "run.dir=a,b",
            "run.dir=a,b: several values are a sweep, which is started with -m; a list is run.dir=[a,b], a text "
            """'run.dir="a,b"'""",
        ),
        ("train.steps", "train.steps: a setting is given as NAME=VALUE, as in train.steps=100; see --help"),
        ("=3", "=3: a setting is given as NAME=VALUE, as in train.steps=100; see --help"),
        ("model.é=3", "model.é=3: a setting is given as NAME=VALUE, as in train.steps=100; see --help"),
        ("a b=3", "a b=3: a setting is given as NAME=VALUE, as in train.steps=100; see --help"),
    ],
)
def test_a_mistake_is_told_in_our_words(argument: str, line: str) -> None:
    assert told(argument) == line


def test_of_two_files_the_added_one_is_named() -> None:
    assert told("model=tiny", "+model=gpt2_moe").startswith("+model=gpt2_moe: model has a file already;")


@pytest.mark.parametrize("value", ["a=b", "a b(c", "a,b", "it's", "${x}$"])
def test_the_quotes_that_are_proposed_are_right(value: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = compose("pretrain", overrides=[f'run.dir="{value}"'.replace("${", r"\${")])
    assert OmegaConf.to_container(found.run)["dir"].replace("\\", "") == value  # type: ignore[index, call-overload, union-attr]


@pytest.mark.parametrize(
    ("group", "option", "said"),
    [
        ("schedule", "lina", ", but a strategy has this name: strategy=lina; there are constant, cosine"),
        ("strategy", "cosine", ", but a schedule has this name: schedule=cosine; there are auto, ddp"),
        ("model", "laptop2", " (did you mean laptop?); there are bench"),
        ("router", "adamw", ", but an optim has this name: optim=adamw; there are "),
    ],
)
def test_a_name_of_another_group_is_told_as_that(group: str, option: str, said: str) -> None:
    assert told(f"{group}={option}").startswith(f"{group}={option}: there is no such file in conf/{group}{said}")


def test_there_is_one_configuration_and_there_are_experiments() -> None:
    line = told(config="nosuch")
    assert line.startswith("--config-name nosuch: leave it out, there is one configuration; its recipes are experiment=")
    assert "laptop" in line


# settings that aren't there


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optm.lr", "optim.lr"),
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("router.topk", "router.top_k"),
        ("train.batch_size", "train.global_batch_size or train.micro_batch_size"),
        ("train.num_layers", "model.num_layers"),
        ("modle", "model"),
        ("stepz", "train.steps"),
        ("modle.num_layer", "model.num_layers"),
        ("trian.stepz", "train.steps"),
    ],
)
def test_what_is_near_is_suggested(typed: str, meant: str) -> None:
    line = no_such_setting(typed, settings())
    guesses = re.findall(r"\(did you mean (.*)\?\)", line)
    assert line.startswith(f"there is no setting {typed} (") and guesses and guesses == [meant]


@pytest.mark.parametrize("typed", ["parallel.hierarchy", "router.sinkhorn_rounds", "train.foo", "optim.momentum_of_kitchen"])
def test_nothing_far_is_suggested_and_the_group_is_listed(typed: str) -> None:
    group = typed.split(".")[0]
    own = [k.split(".")[1] for k in settings() if k.count(".") == 1 and k.startswith(f"{group}.")]
    assert no_such_setting(typed, settings()) == f"there is no setting {typed}; {group} has {', '.join(own)}; see --help"


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    for typed in ("foo.bar", "zz", "name.of.nothing"):
        assert no_such_setting(typed, settings()) == f"there is no setting {typed}; see --help"


# files


def missing(path: str, number: int = errno.ENOENT) -> OSError:
    return OSError(number, "told", path)


@pytest.mark.parametrize(
    ("path", "arguments", "line"),
    [
        ("none.json", ["strategy.plan=none.json"], "strategy.plan=none.json: told"),
        ("elsewhere/none.json", [], "elsewhere/none.json: told"),
        ("none.json", ["strategy.plan=none.json", "run.dir=here"], "strategy.plan=none.json: told"),
        ("runs", [], "runs: told; run.dir must be a folder that can be written"),
        ("here", ["run.dir=here/below"], "here: told; run.dir must be a folder that can be written"),
        ("here/config.yaml", ["run.dir=here"], "here/config.yaml: told; run.dir must be a folder that can be written"),
        ("/c/corpus-1", ["data.cache_dir=/c"], "/c/corpus-1: told; data.cache_dir must be a folder that can be written"),
        ("here", ["run.dir=here"], "here: told; run.dir must be a folder that can be written"),
    ],
)
def test_the_hint_about_folders_belongs_to_folders(path: str, arguments: list[str], line: str) -> None:
    assert explain(missing(path), arguments) == line


def test_an_error_without_a_file_is_only_itself() -> None:
    assert explain(OSError(errno.ENOSPC, "No space left on device"), ["run.dir=here"]) == "No space left on device"
    assert explain(ValueError("train.steps=0 must be at least 1"), []) == "train.steps=0 must be at least 1"


def test_every_group_of_the_schema_has_settings_that_can_be_listed() -> None:
    for path in sorted(Path(CONF).iterdir()):
        if path.is_dir() and path.name not in ("experiment", "infer", "pipeline"):
            assert f"{path.name} has " in no_such_setting(f"{path.name}.qqqqqqqq", settings())
