"""Results by name that take long to make, made a group at a time: whoever asks for one of `make test` makes those alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class InGroups(dict[str, Any]):
    """`make(group)` gives the results of a group's names; it is called when one of them is first asked for, after the groups
    before it, whose files it may need."""

    def __init__(self, groups: Sequence[Sequence[str]], make: Callable[[Sequence[str]], Mapping[str, Any]]):
        super().__init__()
        self._left, self._make = list(groups), make

    def __missing__(self, name: str) -> Any:
        while name not in self and self._left:
            self.update(self._make(self._left.pop(0)))
        if name not in self:
            raise KeyError(name)
        return self[name]
