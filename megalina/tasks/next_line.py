"""Next line: which of four lines of one file follows.

The others are of about the same length, so that short lines, which are likelier, have no advantage.
"""

from collections.abc import Sequence

from megalina.tasks.draws import Draws, in_turn
from megalina.tasks.task import MultipleChoice

CHOICES = 4
LINES_BEFORE = 8
SHORTEST, LONGEST = 12, 80  # characters of a choice, without the spaces around it
LONGEST_BEFORE = 160  # characters of a line of the context
NEAREST = 12  # lines by length, of which the others are drawn
PER_DOCUMENT = 24


def examples(documents: Sequence[str], count: int, draws: Draws) -> list[MultipleChoice]:
    """At most so many, from all documents in turn."""
    return in_turn([_of_document(text, draws) for text in documents], count)


def _of_document(text: str, draws: Draws) -> list[MultipleChoice]:
    lines = [line.rstrip() for line in text.split("\n")]
    fit = [i for i, line in enumerate(lines) if SHORTEST <= len(line.strip()) <= LONGEST]
    before = [
        i for i in fit if i >= LINES_BEFORE and lines[i - 1] and max(map(len, lines[i - LINES_BEFORE : i])) <= LONGEST_BEFORE
    ]
    out = []
    for i in draws.sample(before, PER_DOCUMENT):
        near = {line.strip() for line in lines[i - LINES_BEFORE : i + 1]}
        others = {lines[j].strip(): lines[j] for j in fit if lines[j].strip() not in near}
        nearest = sorted(others.values(), key=lambda line: (abs(len(line) - len(lines[i])), line))[:NEAREST]
        if len(nearest) >= CHOICES - 1:
            shuffled = draws.sample([lines[i], *draws.sample(nearest, CHOICES - 1)], CHOICES)
            context = "\n".join(lines[i - LINES_BEFORE : i])
            out.append(MultipleChoice(context, tuple(f"\n{line}" for line in shuffled), shuffled.index(lines[i])))
    return out
