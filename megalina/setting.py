"""One setting of a schema: a number between bounds, or a choice; and all settings of a configuration."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, get_type_hints

Value = TypeVar("Value", int, float, str)
POSITIVE = 5e-324  # the smallest float above zero
BELOW_ONE = 1 - 2**-53
LARGEST_FLOAT = 3e38  # float32 holds no more
LARGEST_FACTOR = 1e12  # of what gets into weights or activations: float32 can still sum up a million million of its squares
LARGEST_SIZE = 2**31 - 1  # of a dimension
LARGEST_COUNT = 2**53  # metrics are floats, which count no further


def setting(
    default: Value, *, low: float = 0, high: float | None = None, choices: tuple[str, ...] = (), own: bool = False
) -> Value:
    """A field of a schema that is a number from `low` to `high` (None: the largest there may be), or one of `choices`; `own`: or
    code of your own, as folder/file.py:Name."""
    if choices:
        return field(default=default, metadata={"choices": choices, "own": own})
    largest = LARGEST_FLOAT if isinstance(default, float) else LARGEST_SIZE
    return field(default=default, metadata={"low": low, "high": largest if high is None else high})


def settings(config: Any, having: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Every setting of a group and the groups in it: dotted key, value, and what `setting` says that it may be.  `having`: only
    settings with this key in that ("low": numbers; "choices")."""
    keys, values_of = _settings_of(config.__class__, having)
    for (key, may_be), value in zip(keys, values_of(config)):
        yield key, value, may_be


@cache  # a star test asks some ten thousand configurations for their hundreds of settings
def _settings_of(schema: type, having: str) -> tuple[list[tuple[str, Mapping[str, Any]]], Callable[[Any], Iterable[Any]]]:
    keys = [(key, may_be) for key, may_be in _walked(schema, "") if not having or having in may_be]
    names = [key for key, _ in keys]
    return keys, attrgetter(*names) if len(names) > 1 else lambda config: [attrgetter(name)(config) for name in names]


def _walked(schema: Any, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    hints = get_type_hints(schema)
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            yield from _walked(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.metadata


def choices_of(schema: type, name: str) -> tuple[str, ...]:
    """What a field may be."""
    found: tuple[str, ...] = next(f for f in fields(schema) if f.name == name).metadata["choices"]
    return found
