"""Draws from a seed, the same on every machine and under every version of Python.

Of `random`, only the stream of `random()` is promised never to change, so all else is made of it.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


class Draws:
    def __init__(self, *seed: object) -> None:
        """Other words, other draws."""
        words = "\n".join(map(str, seed)).encode()
        self._random = random.Random(int.from_bytes(hashlib.sha256(words).digest()))

    def below(self, count: int) -> int:
        return int(self._random.random() * count)

    def sample(self, values: Sequence[Value], count: int) -> list[Value]:
        """So many of them, each once, in the order in which they were drawn; fewer where there are no more."""
        rest, out = list(values), list[Value]()
        while rest and len(out) < count:
            i = self.below(len(rest))
            rest[i], rest[-1] = rest[-1], rest[i]
            out.append(rest.pop())
        return out

    def pick(self, values: Sequence[Value]) -> Value:
        return values[self.below(len(values))]


def in_turn(lists: Sequence[Sequence[Value]], count: int) -> list[Value]:
    """The first of each list, then the second of each, until there are so many."""
    out: list[Value] = []
    for i in range(max(map(len, lists), default=0)):
        for values in lists:
            if i < len(values):
                out.append(values[i])
                if len(out) == count:
                    return out
    return out
