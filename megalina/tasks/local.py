"""Local tasks: multiple choice made of the run's own held-out text, or of a seed, without a network.

What they ask is a function of the text, the seed and `VERSION` alone.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from megalina.tasks import arithmetic, brackets, cloze, next_line
from megalina.tasks.draws import Draws
from megalina.tasks.task import MultipleChoice

VERSION = 1  # raise it when examples change: scores of other versions are of other questions
Maker = Callable[[Sequence[str], int, Draws], list[MultipleChoice]]
MAKERS: Mapping[str, Maker] = {
    "cloze": cloze.examples,
    "brackets": brackets.examples,
    "next_line": next_line.examples,
    "arithmetic": arithmetic.examples,
}
OF_NO_TEXT = ("arithmetic",)


@dataclass(frozen=True, slots=True)
class LocalTask:
    name: str
    examples: tuple[MultipleChoice, ...]

    @property
    def sha256(self) -> str:
        """Of all that it asks."""
        return hashlib.sha256(json.dumps([asdict(e) for e in self.examples]).encode()).hexdigest()


def make_tasks(names: Sequence[str], documents: Sequence[str], *, examples: int, seed: int) -> list[LocalTask]:
    """At most so many `examples` each, from all `documents` in turn.  ValueError where the text gives none for a task."""
    out = []
    for name in names:
        found = MAKERS[name](documents, examples, Draws(VERSION, name, seed))
        if not found:
            raise ValueError(
                f"task {name}: {len(documents)} held-out documents with {sum(map(len, documents))} characters give no example: "
                f"leave it out, or hold out more text with data.split (tasks: {', '.join(MAKERS)})"
            )
        out.append(LocalTask(name, tuple(found)))
    return out
