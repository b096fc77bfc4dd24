"""A task: a text, and what may come after it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    context: str  # "": the start of a document
    choices: tuple[str, ...]
    answer: int  # index of the right one

    @property
    def chance(self) -> float:
        """Accuracy of who knows nothing."""
        return 1 / len(self.choices)

    @property
    def answer_bytes(self) -> int:
        """Of the right one, in UTF-8, spaces in front included: they are scored, too."""
        return len(self.choices[self.answer].encode())


@dataclass(frozen=True, slots=True)
class Cloze:
    context: str
    target: str


Task = MultipleChoice | Cloze


def texts_of(task: Task) -> Sequence[str]:
    """What is scored after its context, in turn."""
    return task.choices if isinstance(task, MultipleChoice) else (task.target,)
