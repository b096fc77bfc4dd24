"""Arithmetic: what a short calculation gives, as a session of Python has it.

Three calculations with their results come first, so the form is known.  Sums and differences are of numbers below 50, products of
numbers up to 12.  The other choices are near the result and have as many digits.  How many of them are below it is drawn first,
so the number in the middle is not right more often than others.
"""

from collections.abc import Sequence

from megalina.tasks.draws import Draws
from megalina.tasks.task import MultipleChoice

CHOICES = 4
SHOWN = 3
OPERATORS = "+-*"
FARTHEST = 6  # of another choice from the result


def examples(documents: Sequence[str], count: int, draws: Draws) -> list[MultipleChoice]:
    """So many; `documents` are not needed."""
    return [_example(OPERATORS[i % len(OPERATORS)], draws) for i in range(count)]


def _example(operator: str, draws: Draws) -> MultipleChoice:
    shown = [_calculation(draws.pick(OPERATORS), draws) for _ in range(SHOWN)]
    asked, result = _calculation(operator, draws)
    near = [n for n in range(max(0, result - FARTHEST), result + FARTHEST + 1) if len(str(n)) == len(str(result))]
    lower, higher = [n for n in near if n < result], [n for n in near if n > result]
    counts = range(max(0, CHOICES - 1 - len(higher)), min(CHOICES - 1, len(lower)) + 1)
    num_lower = draws.pick(counts)
    others = draws.sample(lower, num_lower) + draws.sample(higher, CHOICES - 1 - num_lower)
    shuffled = draws.sample([result, *others], CHOICES)
    context = "".join(f">>> {text}\n{number}\n" for text, number in shown) + f">>> {asked}"
    return MultipleChoice(context, tuple(f"\n{number}" for number in shuffled), shuffled.index(result))


def _calculation(operator: str, draws: Draws) -> tuple[str, int]:
    """Its text and its result, which is not negative."""
    below = 13 if operator == "*" else 50
    a, b = draws.below(below), draws.below(below)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    return f"{a} {operator} {b}", {"+": a + b, "-": a - b, "*": a * b}[operator]
