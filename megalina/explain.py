"""What a mistake in a configuration is, in one line that says what to change: for our errors, Hydra's, OmegaConf's and files'."""

import difflib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from megalina.compose import CONF
from megalina.config import PretrainConfig
from megalina.nearest import nearest

NEAR = 0.7  # difflib's ratio of two names, from which on one is taken for a slip of the other
LONG_PART = 4  # letters of a name that say which one is meant
MOST_GUESSES = 3
VALUES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "ListConfig": "a list, such as [1,2]"}
FOLDERS = ("run.dir", "data.cache_dir", "hydra.sweep.dir")  # settings that must be folders to write to


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """The line for `error`; `arguments`: the command line's, of which it names the one at fault."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause)
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    if isinstance(error, MissingConfigException):
        return _missing_file(text)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return _file(error, arguments)
    key = match[1] if (match := re.search(r"full_key: ([\w.]+)", text)) else ""
    for pattern, words in OF_HYDRA.items():
        if found := re.search(pattern, text):
            return words(found, key, arguments)
    noise = re.compile(r"\s*(full_key|reference_type|object_type|See https)")
    line = " ".join(line.strip() for line in text.splitlines() if line.strip() and not noise.match(line))
    return f"{key}: {line}" if key and key not in line else line


def no_such_setting(key: str, keys: Sequence[str]) -> str:
    """ "there is no setting ..." with the name that was meant, if one of `keys` is near; else with its group's settings."""
    group, _, name = key.rpartition(".")
    own = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group]
    groups = {k.rpartition(".")[0] for k in keys} - {""}
    guesses = [k for k in keys if k.rpartition(".")[2] == name]
    if group and group not in groups and (meant := difflib.get_close_matches(group, sorted(groups), n=1, cutoff=NEAR)):
        group = meant[0]
        own = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group]
        guesses = [f"{group}.{name}"] if name in own else guesses
    if not guesses:
        part_of = [o for o in own if name in o and len(name) >= LONG_PART]
        guesses = [f"{group}.{o}".lstrip(".") for o in part_of or difflib.get_close_matches(name, own, n=1, cutoff=NEAR)]
    if not guesses and not group:  # without its group
        near = difflib.get_close_matches(name, sorted({k.rpartition(".")[2] for k in keys}), n=1, cutoff=NEAR)
        guesses = [k for k in keys if near and k.rpartition(".")[2] == near[0]]
    if 0 < len(guesses) <= MOST_GUESSES:
        return f"there is no setting {key} (did you mean {' or '.join(guesses)}?); see --help"
    if group in groups:
        return f"there is no setting {key}; {group} has {', '.join(own)}; see --help"
    return f"there is no setting {key}; see --help"


def settings(schema: type = PretrainConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, groups included."""
    found = []
    for field in fields(schema):
        found.append(prefix + field.name)
        if isinstance(field.type, type) and is_dataclass(field.type):
            found += settings(field.type, f"{prefix}{field.name}.")
    return found


def _unreadable(override: str) -> str:
    name, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[+~]{0,2}[\w./@:]+", name, re.ASCII):
        return f"{override}: a setting is given as NAME=VALUE, as in train.steps=100; see --help"
    quoted = shlex.quote(f'{name}="{value}"') if '"' not in value else f"{name}='...' in double quotes"
    return f"{override}: such characters in a value must be in quotes of their own: {quoted}"


def _missing_file(text: str) -> str:
    if missing := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, option = missing.groups()
        options = _options(group)
        others = [f.name for f in fields(PretrainConfig) if f.name != group and option in _options(f.name)]
        if others:
            kinds = " and ".join(f"{'an' if other[0] in 'aeio' else 'a'} {other}" for other in others)
            named = " or ".join(f"{other}={option}" for other in others)
            hint = f", but {kinds} {'has' if len(others) == 1 else 'have'} this name: {named}"
        else:
            hint = nearest(option, options)
        return f"{group}={option}: there is no such file in conf/{group}{hint}; there are {', '.join(options)}"
    if primary := re.search(r"Cannot find primary config '([^']*)'", text):
        recipes = ", ".join(_options("experiment"))
        return f"--config-name {primary[1]}: leave it out, there is one configuration; its recipes are experiment={recipes}"
    return " ".join(text.split("Config search path")[0].split())


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _file(error: OSError, arguments: Sequence[str]) -> str:
    """With the setting that named the file, and what to do where it is one of those that must be folders."""
    text = error.strerror or str(error)
    if not error.filename:
        return text
    where = Path(str(error.filename))
    given = {name.lstrip("+"): value for name, _, value in (argument.partition("=") for argument in arguments) if value}
    if name := next((name for name, value in given.items() if Path(value) == where and name not in FOLDERS), ""):
        return f"{name}={where}: {text}"
    defaults = PretrainConfig()
    folders = {"run.dir": defaults.run.dir.split("/")[0], "data.cache_dir": defaults.data.cache_dir}
    for name, folder in (folders | {name: given[name] for name in FOLDERS if name in given}).items():
        here, there = Path(folder).absolute(), where.absolute()
        if there.is_relative_to(here) or here.is_relative_to(there):
            return f"{where}: {text}; {name} must be a folder that can be written"
    return f"{where}: {text}"


def _typed(key: str, arguments: Sequence[str]) -> str:
    """The argument that set `key`, else the key."""
    return next((a for a in arguments if a.partition("=")[0].lstrip("+~") == key), key)


def _unknown(found: re.Match[str], key: str, arguments: Sequence[str]) -> str:
    key = key or found[1]
    typed = [argument.split("=")[0].lstrip("+~") for argument in arguments]
    key = next((name for name in typed if name.startswith(f"{key}.")), key)
    return no_such_setting(key, settings())


def _not_empty(found: re.Match[str], key: str, arguments: Sequence[str]) -> str:
    return f"{_typed(found[1], arguments)}: {found[1]} needs a value; leave it out for its default"


def _not_deleted(_: re.Match[str], key: str, arguments: Sequence[str]) -> str:
    return f"~{key}: a setting can't be taken out; leave it out for its default, or give it a value: {key}=VALUE"


def _nothing_to_delete(found: re.Match[str], _: str, arguments: Sequence[str]) -> str:
    return f"~{found[1]}: {no_such_setting(found[1], settings())}"


def _no_option(found: re.Match[str], _: str, arguments: Sequence[str]) -> str:
    given = [argument.split("=", 1) for argument in arguments if "=" in argument]
    wrong = [(g, option) for g, option in given if (CONF / g).is_dir() and not (CONF / g / f"{option}.yaml").exists()]
    lines = [f"{g}={option}: {g} wants the name of a file in conf/{g}: {', '.join(_options(g))}" for g, option in wrong if g]
    return "; ".join(lines) or _unreadable(next((a for a in arguments if a.startswith("=")), found[0]))


def _several_values(found: re.Match[str], _: str, arguments: Sequence[str]) -> str:
    name, _, value = found[1].partition("=")
    quoted = shlex.quote(f'{name}="{value}"')
    return f"{found[1]}: several values are a sweep, which is started with -m; a list is {name}=[{value}], a text {quoted}"


def _wrong_kind(found: re.Match[str], key: str, arguments: Sequence[str]) -> str:
    return f"{_typed(key, arguments)} must be {VALUES[found[1]]}"


def _no_group(_: re.Match[str], key: str, arguments: Sequence[str]) -> str:
    one = next(k for k in settings() if k.startswith(f"{key}."))
    return f"{_typed(key, arguments)}: {key} is a group of settings, give one of them: {one}=VALUE"


def _no_reference(found: re.Match[str], key: str, arguments: Sequence[str]) -> str:
    return f"{_typed(key, arguments)}: {key} refers to {found[1]}, and {no_such_setting(found[1], settings())}"


def _chosen_twice(found: re.Match[str], _: str, arguments: Sequence[str]) -> str:
    typed = next((a for a in arguments if a.startswith(f"+{found[1]}=")), found[1])
    return f"{typed}: {found[1]} has a file already; take another one with {found[1]}=NAME, without the +"


# What Hydra and OmegaConf say, and what we say in its place, given the match, the key if they name one, and the arguments.
OF_HYDRA: dict[str, Callable[[re.Match[str], str, Sequence[str]], str]] = {
    r"Key '([^']*)' not in '(\w+)'": _unknown,
    r"field '([\w.]+)' is not Optional": _not_empty,
    r"does not support deletion": _not_deleted,
    r"Could not delete from config\. '([\w.]+)' does not exist": _nothing_to_delete,
    r"Config group override must be a string": _no_option,
    r"Ambiguous value for argument '(.*)'": _several_values,
    r"could not be converted to (Integer|Float)": _wrong_kind,
    r"is not a valid (bool)": _wrong_kind,
    r"is not a (ListConfig), list or tuple": _wrong_kind,
    r"Invalid type assigned: \w+ is not a subclass of": _no_group,
    r"Interpolation key '([^']*)' not found": _no_reference,
    r"(\w+) appears more than once in the final defaults list": _chosen_twice,
    r"Multiple values for (\w+)\.": _chosen_twice,
}
