"""Cloze: which word of a docstring comes next.

Of Python source, the context is the definition and its docstring up to the word.  Text in which there is no docstring gives its
paragraphs instead.  The other choices are words of the same text, not of the passage, as long as the right one or a letter more
or less.  Who knows how frequent words are does better than chance: the right word is drawn from the text, the others from its
vocabulary.
"""

import ast
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megalina.tasks.draws import Draws, in_turn
from megalina.tasks.task import MultipleChoice

CHOICES = 4
WORD = re.compile(r"(?<=[A-Za-z,]) ([a-z]{4,12})\b")  # after a word of the same line
WORDS_BEFORE = 5  # of the docstring, at least
MOST_CHARACTERS = 600  # of a context
PER_DOCUMENT = 24  # passages
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Passages = list["Passage"]


@dataclass(frozen=True, slots=True)
class Passage:
    text: str
    start: int  # of its prose

    def places(self) -> list[re.Match[str]]:
        """Words with some prose before them."""
        found = [m for m in WORD.finditer(self.text, self.start) if m.start() <= MOST_CHARACTERS]
        return [m for m in found if len(self.text[self.start : m.start()].split()) >= WORDS_BEFORE]


def examples(documents: Sequence[str], count: int, draws: Draws) -> list[MultipleChoice]:
    """At most so many, from all documents in turn."""
    passages = [draws.sample(passages_of(text), PER_DOCUMENT) for text in documents]
    by_length: dict[int, list[str]] = defaultdict(list)
    for word in sorted({m[1] for own in passages for passage in own for m in passage.places()}):
        by_length[len(word)].append(word)
    made = [[_example(passage, by_length, draws) for passage in own] for own in passages]
    return in_turn([[example for example in own if example is not None] for own in made], count)


def _example(passage: Passage, by_length: dict[int, list[str]], draws: Draws) -> MultipleChoice | None:
    places = passage.places()
    if not places:
        return None
    place = draws.pick(places)
    word, own = place[1], set(re.findall("[a-z]+", passage.text))
    others = [w for length in (-1, 0, 1) for w in by_length[len(word) + length] if w not in own]
    if len(others) < CHOICES - 1:
        return None
    words = [word, *draws.sample(others, CHOICES - 1)]
    shuffled = draws.sample(words, CHOICES)
    return MultipleChoice(passage.text[: place.start()], tuple(f" {w}" for w in shuffled), shuffled.index(word))


def passages_of(text: str) -> Passages:
    """Definitions with their docstrings, or else paragraphs."""
    return _docstrings(text) or [Passage(p.strip(), 0) for p in re.split(r"\n\s*\n", text) if len(p.split()) > WORDS_BEFORE]


def _docstrings(text: str) -> Passages:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the text's own strings
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
    lines, out = re.split(r"\r\n|\r|\n", text), []
    for node in ast.walk(tree):
        if not isinstance(node, DEFINITIONS) or not ast.get_docstring(node):
            continue
        docstring = node.body[0]
        first = docstring.lineno if isinstance(node, ast.Module) else node.lineno
        code = "\n".join(lines[first - 1 : docstring.lineno - 1])
        prose = "\n".join(lines[docstring.lineno - 1 : docstring.end_lineno])
        out.append(Passage(f"{code}\n{prose}" if code else prose, len(code)))
    return out
