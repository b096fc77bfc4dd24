"""Arithmetic: what a short calculation gives, as a session of Python has it.

Three calculations with their results come first, so the form is known.  Sums and differences are of numbers below 50, products of
numbers up to 12.  The other choices are near the result, with as many digits where that can be.
"""

from collections.abc import Sequence

from megalina.tasks.draws import Draws
from megalina.tasks.task import MultipleChoice

CHOICES = 4
SHOWN = 3
OPERATORS = "+-*"
NEAR = (1, -1, 2, -2, 3, -3, 10, -10, 5, -5)


def examples(documents: Sequence[str], count: int, draws: Draws) -> list[MultipleChoice]:
    """So many; `documents` are not needed."""
    return [_example(OPERATORS[i % len(OPERATORS)], draws) for i in range(count)]


def _example(operator: str, draws: Draws) -> MultipleChoice:
    shown = [_calculation(draws.pick(OPERATORS), draws) for _ in range(SHOWN)]
    asked, result = _calculation(operator, draws)
    near = [result + difference for difference in NEAR if result + difference >= 0]
    others = sorted(near, key=lambda number: len(str(number)) != len(str(result)))[: CHOICES + 1]
    shuffled = draws.sample([result, *draws.sample(others, CHOICES - 1)], CHOICES)
    context = "".join(f">>> {text}\n{number}\n" for text, number in shown) + f">>> {asked}"
    return MultipleChoice(context, tuple(f"\n{number}" for number in shuffled), shuffled.index(result))


def _calculation(operator: str, draws: Draws) -> tuple[str, int]:
    """Its text and its result, which is not negative."""
    below = 13 if operator == "*" else 50
    a, b = draws.below(below), draws.below(below)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    return f"{a} {operator} {b}", {"+": a + b, "-": a - b, "*": a * b}[operator]
