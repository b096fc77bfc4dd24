"""Results by name that take long to make, made a group at a time: whoever asks for one of `make test` makes those alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class InGroups(dict[str, Any]):
    """`make(group)` gives the results of a group's names; it is called when one of them is first asked for."""

    def __init__(self, groups: Sequence[Sequence[str]], make: Callable[[Sequence[str]], Mapping[str, Any]]):
        super().__init__()
        self._groups, self._make = groups, make

    def __missing__(self, name: str) -> Any:
        (group,) = (group for group in self._groups if name in group)
        self.update(self._make(group))
        return self[name]
