"""Brackets: which one closes next.

Contexts are source or text up to a closing bracket whose opener they hold.  As many answers are of one kind as of another, so who
always says the same is right by chance.  Kinds that the text hardly has are no choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megalina.tasks.draws import Draws, in_turn
from megalina.tasks.task import MultipleChoice

OPENERS = {")": "(", "]": "[", "}": "{"}
FARTHEST = 300  # characters between the two
LEAST = 2
MOST_CHARACTERS = 500  # of a context
PER_DOCUMENT = 32  # places of one kind


@dataclass(frozen=True, slots=True)
class Place:
    context: str
    space: str  # before the bracket
    closer: str


def examples(documents: Sequence[str], count: int, draws: Draws) -> list[MultipleChoice]:
    """At most so many, from all documents in turn; none where all brackets are of one kind."""
    places = [places_of(text) for text in documents]
    of_kind = {}
    for closer in OPENERS:
        lists = [draws.sample([p for p in own if p.closer == closer], PER_DOCUMENT) for own in places]
        of_kind[closer] = in_turn(lists, count)
    kinds = [closer for closer, found in of_kind.items() if len(found) * 6 >= count]
    if len(kinds) < 2:
        return []
    each = min(count // len(kinds), *(len(of_kind[closer]) for closer in kinds))
    out = []
    for place in in_turn([of_kind[closer][:each] for closer in kinds], each * len(kinds)):
        shuffled = draws.sample(kinds, len(kinds))
        out.append(MultipleChoice(place.context, tuple(place.space + c for c in shuffled), shuffled.index(place.closer)))
    return out


def places_of(text: str) -> list[Place]:
    """Closing brackets with something between them and their openers.  Where brackets don't match, as in strings, all that were
    open are forgotten."""
    out, opened = [], list[tuple[int, str]]()
    for at, character in enumerate(text):
        if character in "([{":
            opened.append((at, character))
        elif character in OPENERS:
            if not opened or opened[-1][1] != OPENERS[character]:
                opened.clear()
                continue
            start, _ = opened.pop()
            if len(text[start + 1 : at].strip()) >= LEAST and at - start <= FARTHEST:
                first = max(0, text.rfind("\n", 0, max(0, at - MOST_CHARACTERS)) + 1, at - 2 * MOST_CHARACTERS)
                context = text[first:at].rstrip()
                out.append(Place(context, text[first + len(context) : at], character))
    return out
