"""An order of a step's instructions, as text: what a search has found, on top of the list that a plan's numbers give.

A line an instruction: its tag, and of a START what it may be held back by: `B:dense.1>.-.0#2 credit=1 yields=TOKENS`.  Pieces of
a bucket are counted (`#2` is the third), for how many elements a bucket has depends on the tokenizer, and on padding.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from megalina.step.program import MOVABLE, Instruction, Kind, Op, Program

SHOWN = 3  # instructions, in an error


def names_of(program: Program) -> list[str]:
    """What each instruction is called in an order."""
    pieces: dict[tuple[Op | None, str], set[tuple[int, int]]] = defaultdict(set)
    for instruction in program:
        if instruction.op in MOVABLE:
            pieces[instruction.op, instruction.name].add(instruction.piece)
    number = {(key, piece): i for key, of_bucket in pieces.items() for i, piece in enumerate(sorted(of_bucket))}

    def name(instruction: Instruction) -> str:
        if instruction.op not in MOVABLE:
            return instruction.tag
        return f"{instruction.tag.partition('[')[0]}#{number[(instruction.op, instruction.name), instruction.piece]}"

    return list(map(name, program))


def order_of(program: Program) -> tuple[str, ...]:
    """The order of a list, as `ordered` reads it."""
    return tuple(map(_line, names_of(program), program))


def _line(name: str, instruction: Instruction) -> str:
    words = [name]
    if instruction.kind is Kind.START and instruction.credit:
        words.append(f"credit={instruction.credit}")
    if instruction.yields_to:
        words.append(f"yields={'+'.join(op.name for op in instruction.yields_to)}")
    return " ".join(words)


def ordered(program: Program, order: Sequence[str]) -> Program:
    """The same instructions in another order, with its credits and yields; whether it is legal, `check` says.

    ValueError, with names of what differs, for an order of other instructions."""
    by_name = dict(zip(names_of(program), program, strict=True))
    lines = [_parsed(line) for line in order]
    names = [name for name, _, _ in lines]
    known = set(names)
    wrong = {
        "which this step does not have": [name for name in names if name not in by_name],
        "twice": [name for name, count in Counter(names).items() if count > 1],
    }
    for what, found in wrong.items():
        if found:
            raise ValueError(f"the plan's order of instructions has {_some(found)} {what}: it is of another step")
    if missing := [name for name in by_name if name not in known]:
        raise ValueError(f"the plan's order of instructions lacks {_some(missing)}: it is of another step")
    if bad := [name for name, credit, yields in lines if (credit or yields) and by_name[name].kind is not Kind.START]:
        raise ValueError(f"the plan's order of instructions holds back {_some(bad)}, which sends nothing")
    return tuple(
        replace(by_name[name], credit=credit, yields_to=yields) if by_name[name].kind is Kind.START else by_name[name]
        for name, credit, yields in lines
    )


def _parsed(line: str) -> tuple[str, int, tuple[Op, ...]]:
    """Name, credit, what it yields to.  ValueError for what isn't written by `order_of`.  Names of updates have a space."""
    name, credit, yields = line, 0, tuple[Op, ...]()
    try:
        if " yields=" in name:
            name, _, words = name.rpartition(" yields=")
            yields = tuple(Op[word] for word in words.split("+"))
        if " credit=" in name:
            name, _, number = name.rpartition(" credit=")
            credit = int(number)
    except (KeyError, ValueError):
        raise ValueError(f"{line!r} is no line of an order of instructions: NAME [credit=N] [yields=TOKENS]") from None
    return name, credit, yields


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def checksum(order: Sequence[str]) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b("\n".join(order).encode(), digest_size=8).hexdigest()


def distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Kendall's tau as a distance: the share of pairs of common instructions that stand the other way round; 0: the same order,
    1: the reverse."""
    place = {_parsed(line)[0]: i for i, line in enumerate(b)}
    places = [place[name] for line in a if (name := _parsed(line)[0]) in place]
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
