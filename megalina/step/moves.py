"""Moves from one order of acts to another legal one: what a search of lists does in each step.

All are drawn from a `Random`, so the same seed makes the same moves.  None: what was drawn is not legal, or changes nothing.
"""

from collections.abc import Sequence
from random import Random

from megalina.step.precedence import Precedence

Order = list[int]
LONGEST = 12  # acts of a block that moves as a whole
FAR = 80  # places that are looked at for something to do while the device stands still


def window(order: Sequence[int], i: int, precedence: Precedence) -> tuple[int, int]:
    """The first and the last place to which the act at place `i` can move with all others in their order."""
    before, after = precedence.before[order[i]], precedence.after[order[i]]
    low = i
    while low > 0 and order[low - 1] not in before:
        low -= 1
    high = i
    while high + 1 < len(order) and order[high + 1] not in after:
        high += 1
    return low, high


def to_place(order: Order, i: int, j: int) -> Order:
    """The act at place `i` at place `j`."""
    out = order[:]
    out.insert(j, out.pop(i))
    return out


def shifted(order: Order, precedence: Precedence, random: Random) -> Order | None:
    """One act elsewhere between those that it needs and those that need it: half of the time near, else anywhere."""
    i = random.randrange(len(order))
    low, high = window(order, i, precedence)
    if random.random() < 0.5:
        low, high = max(low, i - 4), min(high, i + 4)
    j = random.randint(low, high)
    return to_place(order, i, j) if i != j else None


def blocks_swapped(order: Order, precedence: Precedence, random: Random) -> Order | None:
    """Two blocks that stand side by side change places."""
    i = random.randrange(len(order) - 1)
    k = min(len(order) - 1, i + random.randint(1, LONGEST))
    j = min(len(order), k + random.randint(1, LONGEST))
    first = set(order[i:k])
    if any(not first.isdisjoint(precedence.before[act]) for act in order[k:j]):
        return None
    return order[:i] + order[k:j] + order[i:k] + order[j:]


def pulled(order: Order, place: int, precedence: Precedence, random: Random) -> Order | None:
    """Something that comes later is done at `place`, where the device stands still, with all that it needs from there on."""
    i = random.randrange(place + 1, min(len(order), place + 1 + FAR)) if place + 1 < len(order) else place
    if i == place:
        return None
    wanted = {order[i]}
    needed = set(precedence.before[order[i]])
    for act in reversed(order[place:i]):  # what it needs from there on comes along
        if act in needed:
            wanted.add(act)
            needed |= precedence.before[act]
    if order[place] in wanted or len(wanted) > LONGEST:
        return None
    moved = [act for act in order[place : i + 1] if act in wanted]
    rest = [act for act in order[place : i + 1] if act not in wanted]
    return order[:place] + moved + rest + order[i + 1 :]


def pushed(order: Order, place: int, precedence: Precedence, random: Random) -> Order | None:
    """Something that stands before `place` comes right behind it, with all that needs it in between."""
    low = max(0, place - FAR)
    if low >= place:
        return None
    i = random.randrange(low, place)
    moved = {order[i]}
    needing = set(precedence.after[order[i]])
    for act in order[i + 1 : place + 1]:
        if act in needing:
            moved.add(act)
            needing |= precedence.after[act]
    if order[place] in moved or len(moved) > LONGEST:
        return None
    block = order[i : place + 1]
    return order[:i] + [a for a in block if a not in moved] + [a for a in block if a in moved] + order[place + 1 :]
