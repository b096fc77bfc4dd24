"""One setting of a schema: a number between bounds, or a choice; and all settings of a configuration."""

from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from functools import cache
from typing import Any, TypeVar

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
    code of one's own, as folder/file.py:Name."""
    if choices:
        return field(default=default, metadata={"choices": choices, "own": own})
    largest = LARGEST_FLOAT if isinstance(default, float) else LARGEST_SIZE
    return field(default=default, metadata={"low": low, "high": largest if high is None else high})


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Every setting of a group and the groups in it: dotted key, value, and what `setting` says that it may be."""
    for name, may_be in _fields(config.__class__):
        value = getattr(config, name)
        if hasattr(value, "__dataclass_fields__"):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, may_be


@cache
def _fields(schema: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((f.name, f.metadata) for f in fields(schema))


def choices_of(schema: type, name: str) -> tuple[str, ...]:
    """What a field may be."""
    found: tuple[str, ...] = next(f for f in fields(schema) if f.name == name).metadata["choices"]
    return found
