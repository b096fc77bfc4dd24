"""An order of a step's instructions, as text: what a search has found, on top of the list that a plan's numbers give.

A line an instruction: its tag, and of a START what it may be held back by: `B:dense.1>.-.0[0:4096] credit=1 yields=TOKENS`.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megalina.step.program import Instruction, Kind, Op, Program

SHOWN = 3  # instructions, in an error


def order_of(program: Program) -> tuple[str, ...]:
    """The order of a list, as `ordered` reads it."""
    return tuple(map(_line, program))


def _line(instruction: Instruction) -> str:
    words = [instruction.tag]
    if instruction.credit:
        words.append(f"credit={instruction.credit}")
    if instruction.yields_to:
        words.append(f"yields={'+'.join(op.name for op in instruction.yields_to)}")
    return " ".join(words)


def ordered(program: Program, order: Sequence[str]) -> Program:
    """The same instructions in another order, with its credits and yields; whether it is legal, `check` says.

    ValueError, with the tags that differ, for an order of other instructions."""
    by_tag = {instruction.tag: instruction for instruction in program}
    lines = [_parsed(line) for line in order]
    tags = [tag for tag, _, _ in lines]
    known = set(tags)
    wrong = {
        "which this step does not have": [tag for tag in tags if tag not in by_tag],
        "twice": [tag for tag, count in Counter(tags).items() if count > 1],
    }
    for what, found in wrong.items():
        if found:
            raise ValueError(f"an order of instructions has {_some(found)} {what}: it is of another list")
    if missing := [tag for tag in by_tag if tag not in known]:
        raise ValueError(f"an order of instructions lacks {_some(missing)}: it is of another list")
    if bad := [tag for tag, credit, yields in lines if (credit or yields) and by_tag[tag].kind is not Kind.START]:
        raise ValueError(f"an order of instructions holds back {_some(bad)}, which sends nothing")
    return tuple(
        replace(by_tag[tag], credit=credit, yields_to=yields) if by_tag[tag].kind is Kind.START else by_tag[tag]
        for tag, credit, yields in lines
    )


def _parsed(line: str) -> tuple[str, int, tuple[Op, ...]]:
    """Tag, credit, what it yields to.  ValueError for what isn't written by `order_of`.  Tags of updates have a space."""
    tag, credit, yields = line, 0, tuple[Op, ...]()
    try:
        if " yields=" in tag:
            tag, _, words = tag.rpartition(" yields=")
            yields = tuple(Op[word] for word in words.split("+"))
        if " credit=" in tag:
            tag, _, number = tag.rpartition(" credit=")
            credit = int(number)
    except (KeyError, ValueError):
        raise ValueError(f"{line!r} is no line of an order of instructions: TAG [credit=N] [yields=TOKENS]") from None
    return tag, credit, yields


def _some(tags: Sequence[str]) -> str:
    more = f" and {len(tags) - SHOWN} more" if len(tags) > SHOWN else ""
    return ", ".join(tags[:SHOWN]) + more


def checksum(order: Sequence[str]) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b("\n".join(order).encode(), digest_size=8).hexdigest()


def distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Kendall's tau as a distance: the share of pairs of common tags that stand the other way round; 0: the same order, 1: the
    reverse.  Order lines may have their credits."""
    place = {_parsed(line)[0]: i for i, line in enumerate(b)}
    places = [place[tag] for line in a if (tag := _parsed(line)[0]) in place]
    pairs = len(places) * (len(places) - 1) // 2
    return _inversions(places)[1] / pairs if pairs else 0.0


def _inversions(numbers: list[int]) -> tuple[list[int], int]:
    """Sorted, and how many pairs stood the other way round."""
    if len(numbers) < 2:
        return numbers, 0
    half = len(numbers) // 2
    left, in_left = _inversions(numbers[:half])
    right, in_right = _inversions(numbers[half:])
    out, count, i = [], in_left + in_right, 0
    for number in right:
        while i < len(left) and left[i] < number:
            out.append(left[i])
            i += 1
        count += len(left) - i
        out.append(number)
    return out + left[i:], count
