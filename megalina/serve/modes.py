"""A mode: how experts are placed, from a file of conf/infer and overrides such as infer.trigger=never."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from megalina.config import InferConfig
from megalina.nearest import nearest

TYPES = {field.name: type(field.default) for field in fields(InferConfig)}
_SAID = {str: "a word", int: "a whole number", float: "a number", bool: "true or false"}


def read_mode(folder: Path, name: str, overrides: Sequence[str] = ()) -> InferConfig:
    """The settings of FOLDER/NAME.yaml, with overrides `infer.KEY=VALUE` on top.

    ValueError, in one line, for a mode or a key that isn't there and for a value of another type."""
    path = folder / f"{name}.yaml"
    there = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in there:
        raise ValueError(f"there is no mode {name!r}{nearest(name, there)}; there are {', '.join(there)}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold settings, one a line, such as trigger: never")
    values = {str(key): _checked(str(path), str(key), value) for key, value in found.items()}
    values |= {"name": name, **read_overrides(overrides)}
    return replace(InferConfig(), **values)


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """{KEY: value} of `infer.KEY=VALUE`; ValueError as `read_mode`."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (equals and key.startswith("infer.")):
            raise ValueError(f"{text} must be infer.KEY=VALUE, such as infer.trigger=never")
        if key == "infer.name":
            raise ValueError(f"{text}: the name of a mode is that of its file")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{text}: {value} can't be read: {' '.join(str(error).split())}") from error
        name = key.removeprefix("infer.")
        values[name] = _checked(text, name, read)
    return values


def _checked(where: str, key: str, value: Any) -> Any:
    if key not in TYPES:
        raise ValueError(f"{where}: there is no setting infer.{key}{nearest(key, list(TYPES))}")
    wanted = TYPES[key]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}: infer.{key} must be {_SAID[wanted]}, not {value!r}")
    return value
