"""A search of lists: in which order should the instructions of a step stand so that it ends earliest in virtual time?

It begins with lists that are known, and with list schedules of their instructions.  Lists of the same instructions are a family,
whatever plans they are of; the best ones are improved by moves (`megalina/step/moves.py`).  A move is taken unless the step gets
longer: most change nothing by themselves, and open the way for others.  Where nothing is gained for a while, some moves are taken
whatever they cost (iterated local search).  Simulated annealing found worse lists with as many walks.  So many walks in virtual
time and no more, drawn from a seed, without a clock: the same input gives the same list.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from megalina.perfmodel.sim.list_clock import OPS, ListClock, State
from megalina.step.list_scheduling import schedule, tails
from megalina.step.moves import blocks_swapped, pulled, pushed, shifted
from megalina.step.order import order_of
from megalina.step.plan import Plan
from megalina.step.precedence import Precedence
from megalina.step.program import MOVABLE, Instruction, Kind, Op, Program

T = TypeVar("T")
BACKLOGS = (0.0, 1.0, math.inf)  # of list schedules, in times of the longest exchange
NOISES = (0.0, 0.05, 0.15)  # by which priorities of list schedules are off
FOR_SCHEDULES = 0.1  # of what starts leave of the walks
ROUNDS = ((12, 0.3), (4, 0.35))  # so many families, the best ones, are improved with such a share of what is left then, the rest
# is the finalists'; after some hundreds of walks a family is far from what it can become, which takes some thousands
TRIES = 20  # draws that may come to nothing for each walk
CREDITS = (0, 1, 2)
PATIENCE, KICK = 250, 8  # walks without a gain, after which so many moves are taken whatever they cost
AT_IDLE, BLOCKS, MARKS = 0.4, 0.2, 0.1  # shares of moves: where the device stands still, of blocks, of credits and yields


@dataclass(frozen=True, slots=True)
class Start:
    """A list to begin with: what a plan gives."""

    plan: Plan
    program: Program


@dataclass(frozen=True, slots=True)
class Finalist:
    """The best list of the instructions of one start or several; `plan` has its order."""

    plan: Plan
    program: Program
    step_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """`finalists`: the best first; `begun_s`: of each start, its list as it is."""

    finalists: tuple[Finalist, ...]
    evaluations: int
    begun_s: tuple[tuple[Plan, float], ...]

    @property
    def plan(self) -> Plan:
        return self.finalists[0].plan

    @property
    def program(self) -> Program:
        return self.finalists[0].program

    @property
    def step_s(self) -> float:
        return self.finalists[0].step_s


@dataclass(frozen=True, slots=True)
class _List:
    """A list on its way to a better one."""

    acts: list[int]
    ids: list[int]  # all instructions
    credit: list[int]
    yields: list[tuple[int, ...]]
    step_s: float
    idle: list[tuple[int, float]]
    stops: list[State]


def search(
    starts: Sequence[Start],
    clock_of: Callable[[Program], ListClock],
    *,
    evaluations: int,
    seed: int = 0,
    fits: Callable[[Program], bool] | None = None,
    finalists: int = 1,
) -> Found:
    """The best list of each of so many families, the best ones, after at most so many walks in virtual time, but two of each
    start at least.  Two or more are not all in as many parts: what a part costs besides its share is what virtual time knows
    least.

    `fits`: whether a rank has the memory; None: whatever a list needs; starts that don't fit are left out.  ValueError where none
    fits."""
    fitting = [start for start in starts if fits is None or fits(start.program)]
    if not fitting:
        raise ValueError(f"none of {len(starts)} lists to begin with fits into memory: allow more of it")
    random = Random(seed)
    alike: dict[frozenset[Instruction], list[Start]] = {}
    for start in fitting:
        alike.setdefault(frozenset(map(_unmarked, start.program)), []).append(start)
    families = [_Family(of_family, clock_of(of_family[0].program), random, fits) for of_family in alike.values()]
    begun_s = tuple(begun for family in families for begun in family.begun_s)

    def left() -> int:
        return max(0, evaluations - sum(family.walks for family in families))

    def best(number: int) -> list[_Family]:
        """Those whose lists are the fastest."""
        return first_of(sorted(families, key=lambda family: family.best.step_s), number, lambda family: family.plan.parts)

    by_schedules = left() * FOR_SCHEDULES / len(families)
    for family in best(len(families)):
        family.schedule(int(by_schedules))
    walks = left()
    for number, share in (*ROUNDS, (finalists, 1 - sum(share for _, share in ROUNDS))):
        for family in best(number):
            family.improve(min(left(), int(walks * share / min(number, len(families)))))
    return Found(tuple(f.finalist for f in best(finalists)), sum(family.walks for family in families), begun_s)


def first_of(in_turn: Sequence[T], number: int, parts_of: Callable[[T], int]) -> list[T]:
    """So many, of two or more the last one the first in other parts, if those before it are all in as many."""
    chosen = list(in_turn[:number])
    unlike = (one for one in in_turn if parts_of(one) != parts_of(chosen[0]))
    if number > 1 and all(parts_of(one) == parts_of(chosen[0]) for one in chosen):
        chosen = [*chosen[:-1], next(unlike, chosen[-1])]
    return chosen


def _unmarked(instruction: Instruction) -> Instruction:
    """Whatever may hold it back."""
    return replace(instruction, credit=0, yields_to=()) if instruction.kind is Kind.START else instruction


class _Family:
    """Lists of the same instructions, in any order and held back by whatever: those of one start or several."""

    def __init__(self, starts: Sequence[Start], clock: ListClock, random: Random, fits: Callable[[Program], bool] | None):
        program = starts[0].program
        self._program, self.precedence, self.walks = program, Precedence(program), 0
        self._clock, self._random, self._fits = clock, random, fits
        axes_of_tokens = {s.axis for s in program if s.op in (Op.TOKENS, Op.COUNTS)}
        sends = [i for i, s in enumerate(program) if s.kind is Kind.START]
        self._tokens = [i for i in sends if program[i].op is Op.TOKENS]
        self._movable = [i for i in sends if program[i].op in MOVABLE]
        self._may_yield = all(program[i].axis not in axes_of_tokens for i in self._movable)
        number = {_unmarked(instruction): i for i, instruction in enumerate(program)}
        begun: list[tuple[Start, _List]] = []
        for start in starts:
            ids = [number[_unmarked(instruction)] for instruction in start.program]
            marks = dict(zip(ids, start.program, strict=True))
            credit = [marks[i].credit for i in range(len(ids))]
            yields = [tuple(OPS[op] for op in marks[i].yields_to) for i in range(len(ids))]
            acts = [i for i in ids if not self.precedence.is_wait[i]]
            as_it_is = self._walked(acts, ids, credit, yields)
            assert as_it_is is not None
            begun.append((start, as_it_is))
        self.begun_s = tuple((start.plan, as_it_is.step_s) for start, as_it_is in begun)
        first, self.best = min(begun, key=lambda one: one[1].step_s)
        self.plan = first.plan
        for _, one in begun:
            self._take(self._walked(one.acts, self.precedence.listed(one.acts), one.credit, one.yields))

    def program_of(self, found: _List) -> Program:
        ops = {number: op for op, number in OPS.items()}
        program = self._program
        return tuple(
            replace(program[i], credit=found.credit[i], yields_to=tuple(ops[o] for o in found.yields[i]))
            if program[i].kind is Kind.START
            else program[i]
            for i in found.ids
        )

    @property
    def finalist(self) -> Finalist:
        program = self.program_of(self.best)
        return Finalist(replace(self.plan, order=order_of(program)), program, self.best.step_s)

    def schedule(self, walks: int) -> None:
        """List schedules by tails, with priorities that are off here and there, at most so many."""
        seconds = [a or s for a, s in zip(self._clock.alone_s, self._clock.seconds, strict=True)]
        longest_s, tail = max(seconds), tails(self.precedence, seconds)
        options = itertools.product(NOISES, BACKLOGS, CREDITS[:2], (False, True))
        for noise, backlog, credit, yields in itertools.islice(options, walks):
            priority = [t * (1 + noise * self._random.uniform(-1, 1)) for t in tail]
            acts = schedule(self.precedence, seconds, priority, backlog_s=backlog * longest_s)
            marks = self._marks(credit, yields)
            self._take(self._walked(acts, self.precedence.listed(acts), *marks))

    def _marks(self, credit: int, yields: bool) -> tuple[list[int], list[tuple[int, ...]]]:
        """One credit for all tokens; whether gradients and parameters yield."""
        credits, yielding = list(self.best.credit), list(self.best.yields)
        for i in self._tokens:
            credits[i] = credit
        for i in self._movable if self._may_yield else ():
            yielding[i] = (OPS[Op.TOKENS],) if yields else ()
            credits[i] = int(yields)
        return credits, yielding

    def improve(self, walks: int) -> None:
        """By so many walks.  To weigh a list's memory takes longer than to walk it, so those alone are weighed that would be the
        best: on the way there a list may hold too much."""
        now, until, tries, gained = self.best, self.walks + walks, walks * TRIES, self.walks
        while self.walks < until and tries:
            tries -= 1
            if self.walks - gained > PATIENCE:
                if now.step_s == self.best.step_s and self._holds(now):
                    self.best = now
                now, gained = self._kicked(), self.walks
            moved = self._moved(now)
            if moved is None:
                continue
            acts, credit, yields = moved
            found = self._walked(acts, self.precedence.listed(acts), credit, yields, before=now, most_s=now.step_s)
            if found is None or found.step_s > now.step_s:
                continue
            better = found.step_s < self.best.step_s
            if better and not self._holds(found):
                continue
            gained = self.walks if found.step_s < now.step_s else gained
            now = found
            if better or (self._fits is None and now.step_s == self.best.step_s):
                self.best = now

    def _kicked(self) -> _List:
        """Somewhere near the best list, whatever it takes: a way out where no single move helps."""
        now, walked = self.best, self.best
        for _ in range(KICK):
            if (moved := self._moved(now)) is not None:
                acts, credit, yields = moved
                now = replace(now, acts=acts, credit=credit, yields=yields, idle=[])
        found = self._walked(now.acts, self.precedence.listed(now.acts), now.credit, now.yields)
        return walked if found is None else found

    def _take(self, found: _List | None) -> None:
        if found is not None and found.step_s < self.best.step_s and self._holds(found):
            self.best = found

    def _holds(self, found: _List) -> bool:
        return self._fits is None or self._fits(self.program_of(found))

    def _walked(
        self,
        acts: list[int],
        ids: list[int],
        credit: list[int],
        yields: list[tuple[int, ...]],
        *,
        before: _List | None = None,
        most_s: float = math.inf,
    ) -> _List | None:
        """`before`: a list that begins alike; None where it takes longer than `most_s`."""
        self.walks += 1
        stop, stops = None, list[State]()
        if before is not None:
            same = _alike(before, ids, credit, yields)
            stops = [s for s in before.stops if s[0] <= same]
            stop = stops.pop()
        walked = self._clock.walk(ids, credit, yields, after=stop, most_s=most_s)
        if walked.step_s == math.inf:
            return None
        return _List(acts, ids, credit, yields, walked.step_s, walked.idle, stops + walked.stops)

    def _moved(self, now: _List) -> tuple[list[int], list[int], list[tuple[int, ...]]] | None:
        """Acts, credits and yields after a move."""
        random, precedence, kind = self._random, self.precedence, self._random.random()
        if kind < MARKS:
            return self._marked(now)
        if kind < MARKS + BLOCKS:
            acts = blocks_swapped(now.acts, precedence, random)
        elif kind < MARKS + BLOCKS + AT_IDLE and now.idle:
            place = self._place(now)
            pull = random.random() < 0.7
            acts = pulled(now.acts, place, precedence, random) if pull else pushed(now.acts, place, precedence, random)
        else:
            acts = shifted(now.acts, precedence, random)
        return None if acts is None else (acts, now.credit, now.yields)

    def _place(self, now: _List) -> int:
        """Of an act before which the device stands still, the more likely the longer."""
        (at, _), *_ = self._random.choices(now.idle, [s for _, s in now.idle])
        act = next((i for i in now.ids[at:] if not self.precedence.is_wait[i]), now.acts[-1])
        return now.acts.index(act)

    def _marked(self, now: _List) -> tuple[list[int], list[int], list[tuple[int, ...]]] | None:
        """One START may be held back otherwise."""
        held = self._tokens + self._movable
        if not held:
            return None
        i, credit, yields = self._random.choice(held), list(now.credit), list(now.yields)
        if i in self._movable and self._may_yield and self._random.random() < 0.5:
            yields[i] = () if yields[i] else (OPS[Op.TOKENS],)
        else:
            credit[i] = self._random.choice([c for c in CREDITS if c != credit[i]])
        return now.acts, credit, yields


def _alike(before: _List, ids: list[int], credit: list[int], yields: list[tuple[int, ...]]) -> int:
    """How many instructions two lists have in common at their beginning, with what holds them back."""
    same = next((n for n, (a, b) in enumerate(zip(before.ids, ids, strict=True)) if a != b), len(ids))
    if credit is not before.credit or yields is not before.yields:
        marks = zip(before.credit, credit, before.yields, yields, strict=True)
        other = {i for i, (a, b, c, d) in enumerate(marks) if a != b or c != d}
        same = min(same, next((n for n, i in enumerate(ids) if i in other), len(ids)))
    return same
