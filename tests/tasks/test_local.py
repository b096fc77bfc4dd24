"""Local tasks: what they ask, that it is the same each time, and how answers are scored."""

import math
from collections import Counter
from pathlib import Path

import pytest

from megalina.config import LOCAL_TASKS
from megalina.tasks import arithmetic, brackets, cloze, next_line
from megalina.tasks.draws import Draws, in_turn
from megalina.tasks.local import MAKERS, make_tasks
from megalina.tasks.scores import choice_scores
from megalina.tasks.task import MultipleChoice

SOURCES = sorted((Path(__file__).resolve().parents[2] / "megalina" / "data").glob("*.py"))
DOCUMENTS = [path.read_text() for path in SOURCES]
SOURCE = '''def area(width, height):
    """The area of a rectangle, whose sides are both given in metres, as a number."""
    return width * height


class Shape:
    """Something that has corners, an area and a colour which everybody can see."""
'''
TEXTS = [SOURCE, "a (b c) [d e] (f g)\n" * 20, "\n".join(f"line {i} of the file" for i in range(90))]


def test_the_schema_names_every_task() -> None:
    assert tuple(MAKERS) == LOCAL_TASKS


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_examples_are_sound(name: str) -> None:
    (task,) = make_tasks([name], DOCUMENTS, examples=48, seed=3)
    assert 40 <= len(task.examples) <= 48
    for example in task.examples:
        assert len(set(example.choices)) == len(example.choices) >= 2 and 0 <= example.answer < len(example.choices)
        assert example.context and example.context == example.context.rstrip()  # so no space goes over to the choices
        assert all(choice.strip() for choice in example.choices)
    assert max(Counter(example.answer for example in task.examples).values()) < 32  # no place is always right


@pytest.mark.parametrize("name", ["cloze", "brackets", "next_line"])
def test_the_right_answer_is_what_the_text_goes_on_with(name: str) -> None:
    (task,) = make_tasks([name], DOCUMENTS, examples=48, seed=3)
    texts = ["\n".join(line.rstrip() for line in text.split("\n")) for text in DOCUMENTS] + DOCUMENTS
    for example in task.examples:
        right = example.context + example.choices[example.answer]
        assert any(right in text for text in texts), right


def test_a_seed_gives_the_same_questions_for_ever() -> None:
    """Of a fixed text: who changes this raises VERSION."""
    tasks = make_tasks(list(LOCAL_TASKS), TEXTS, examples=9, seed=0)
    found = {task.name: (len(task.examples), task.sha256[:12]) for task in tasks}
    assert found == {
        "cloze": (2, "73aaa11c028f"),
        "brackets": (8, "9f2234457f06"),
        "next_line": (9, "00c784b4e692"),
        "arithmetic": (9, "32a226ad9675"),
    }
    assert make_tasks(["arithmetic"], [], examples=9, seed=1)[0].sha256 != tasks[-1].sha256
    assert Draws("a", 1).sample(range(10), 4) == [9, 2, 6, 5]
    assert Draws("a", 1).sample("ab", 5) in (["a", "b"], ["b", "a"])


def test_a_cloze_begins_with_the_definition_and_ends_in_its_docstring() -> None:
    found = cloze.passages_of(SOURCE)
    assert [passage.text.split("(")[0].split(":")[0] for passage in found] == ["def area", "class Shape"]
    assert [place[1] for place in found[0].places()] == ["whose", "sides", "both", "given", "metres", "number"]
    (prose,) = cloze.passages_of("This is no source at all, but a paragraph of a few words.\n\nShort one.")
    assert prose.start == 0 and prose.text.startswith("This is no source")


def test_brackets_have_their_opener_in_the_context_and_something_between() -> None:
    assert [(p.context, p.closer) for p in brackets.places_of("f(x1, [y2, z]) ()")] == [
        ("f(x1, [y2, z", "]"),
        ("f(x1, [y2, z]", ")"),
    ]
    assert brackets.places_of("(ab] cd)") == []  # they don't match
    (place,) = brackets.places_of("call(\n    one,\n)\n")
    assert (place.context, place.space) == ("call(\n    one,", "\n")
    assert brackets.examples(["(ab) " * 50], 12, Draws(0)) == []  # one kind says nothing
    found = brackets.examples(["(ab) [cd] " * 50], 12, Draws(0))
    assert Counter(e.choices[e.answer] for e in found) == {")": 6, "]": 6} and found[0].chance == 0.5


def test_the_lines_to_choose_from_are_of_about_the_same_length() -> None:
    lines = [f"{'x' * (12 + i % 40)} = {i}" for i in range(200)]
    for example in next_line.examples(["\n".join(lines)], 20, Draws(0)):
        lengths = list(map(len, example.choices))
        assert max(lengths) - min(lengths) <= 3


def test_arithmetic_is_right() -> None:
    ranks = [0] * 4
    for example in arithmetic.examples((), 200, Draws(5)):
        asked = example.context.rpartition(">>> ")[2]
        assert [eval(asked) == int(choice) for choice in example.choices].index(True) == example.answer
        assert len(set(map(len, example.choices))) == 1
        ranks[sorted(map(int, example.choices)).index(eval(asked))] += 1
        shown = example.context.split(">>> ")[1:-1]
        assert all(eval(text.split("\n")[0]) == int(text.split("\n")[1]) for text in shown) and len(shown) == 3
    assert min(ranks) > 30  # the one in the middle is no better guess


def test_text_that_gives_no_example_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"task next_line: 1 held-out documents with 5 characters give no example"):
        make_tasks(["next_line"], ["short"], examples=4, seed=0)


def test_in_turn() -> None:
    assert in_turn([[1, 2, 3], [], [4]], 3) == [1, 4, 2] and in_turn([[1], [2]], 9) == [1, 2] and in_turn([], 2) == []


def test_scores_by_hand() -> None:
    tasks = [MultipleChoice("c", (" ab", " b", " c", " d"), 0), MultipleChoice("c", ("é", "y"), 1)]
    scores = choice_scores(tasks, [[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0]])
    assert scores.accuracy.value == 0.5 and scores.accuracy.standard_error == pytest.approx(0.5)
    assert scores.centred_accuracy.value == pytest.approx((1 + (0 - 0.5) / 0.5) / 2)
    assert scores.bits_per_byte.value == pytest.approx((1 / 3 + 2 / 1) / 2 / math.log(2))
    assert scores.accuracy_by_bytes.value == 0.5 and scores.log_likelihood.value == -1.5 and scores.num_tasks == 2
