"""The search of lists: of small ones it finds the best of all orders; it is bounded, repeatable, and no worse than its starts."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import pytest

from megalina.perfmodel.sim.list_clock import OPS, ListClock
from megalina.perfmodel.sim.list_search import CREDITS, Found, Start, search
from megalina.perfmodel.sim.network import Loads, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.candidates import FLOW, to_search_from
from megalina.step.plan import Plan
from megalina.step.precedence import Precedence
from megalina.step.program import Instruction, Kind, Op, Program, check
from megalina.step.strategy import Setting, given, training_step
from tests.perfmodel.sim.schedules import SHAPES, buckets_of, compute, start, wait

RANKS = 2
SHAPE = SHAPES["experts in every layer"]


def groups(axis: str, rank: int) -> tuple[int, ...]:
    return tuple(range(RANKS))


def named_seconds(instruction: Instruction) -> float:
    """ "a 3" computes for 3 s."""
    return float(instruction.name.split()[1]) if instruction.kind is Kind.COMPUTE else 0.0


def clock_of(program: Program) -> ListClock:
    """Links of 1 byte a second; what is sent has 2 bytes a name says, one of which leaves each rank."""
    sizes = Sizes(lambda instruction: 2 * float(instruction.name.split()[1]))
    loads = Loads(one_level(1.0, 0.25), RANKS)
    return ListClock(program, seconds=named_seconds, sizes=sizes, loads=loads, ranks_of=groups)


def small(seed: int) -> Program:
    """Two parts of a forward pass, each with tokens in between, and something that nobody waits for."""
    random = Random(seed)

    def number() -> str:
        return str(random.choice((1, 2, 3, 5)))

    out: list[Instruction] = []
    for part in ("p", "q"):
        first, tokens, last = f"{part}1 {number()}", f"{part}2 {number()}", f"{part}3 {number()}"
        out += [compute(first, writes=f"{part}a"), start(tokens, reads=f"{part}a"), wait(tokens, writes=f"{part}b")]
        out[-1] = replace(out[-1], reads=(f"{tokens}>",))
        out.append(compute(last, reads=f"{part}b", writes=f"{part}c"))
    out.append(compute(f"free {number()}", reads="pa", writes="f"))
    gradients = f"g {number()}"
    out += [start(gradients, Op.GRADS, "dp", reads="pa"), wait(gradients, Op.GRADS, "dp")]
    return tuple(out)


def orders(precedence: Precedence) -> Iterator[list[int]]:
    """Every order of all instructions, WAITs anywhere, in which each comes after what it needs."""

    def longer(order: list[int], left: frozenset[int]) -> Iterator[list[int]]:
        if not left:
            yield order
        for i in sorted(left):
            if left.isdisjoint(precedence.needs[i]):
                yield from longer([*order, i], left - {i})

    return longer([], frozenset(range(len(precedence.program))))


def best_of(program: Program, lists: Sequence[Sequence[int]], credits: Sequence[tuple[int, ...]]) -> float:
    """The shortest step of these lists, with each of these credits of what is sent, and gradients that yield or don't."""
    clock, sent = clock_of(program), [i for i, s in enumerate(program) if s.kind is Kind.START]
    best_s = math.inf
    for numbers in credits:
        credit = [0] * len(program)
        for i, number in zip(sent, numbers, strict=True):
            credit[i] = number
        for yields in ((), (OPS[Op.TOKENS],)):
            to = [yields if s.op is Op.GRADS and s.kind is Kind.START else () for s in program]
            for ids in lists:
                best_s = min(best_s, clock.walk(ids, credit, to, most_s=best_s).step_s)
    return best_s


def late(precedence: Precedence) -> list[tuple[int, ...]]:
    """Every order of acts, each WAIT as late as can be."""
    acts = (tuple(i for i in order if not precedence.is_wait[i]) for order in orders(precedence))
    return [tuple(precedence.listed(order)) for order in dict.fromkeys(acts)]


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.full] * (n >= 1)) for n in range(12)])
def test_of_small_lists_the_best_order_is_found(seed: int) -> None:
    program = small(seed)
    lists = late(Precedence(program))
    best_s = best_of(program, lists, list(itertools.product(CREDITS, repeat=3)))
    found = search([Start(Plan(), program)], clock_of, evaluations=3000, seed=seed)
    assert len(lists) == 672 and found.step_s == pytest.approx(best_s, rel=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
def test_no_order_with_an_earlier_wait_is_better(seed: int) -> None:
    """Of one list it may be: it holds back what is asked for behind it.  But credits and yields do the same."""
    program = small(seed)
    precedence = Precedence(program)
    every = list(orders(precedence))
    best_s = best_of(program, every, [(n, n, m) for n in CREDITS for m in (0, 1)])
    assert len(every) == 19_800
    assert best_of(program, late(precedence), list(itertools.product(CREDITS, repeat=3))) == pytest.approx(best_s, rel=1e-9)


def clock_of_step(program: Program) -> ListClock:
    seconds = {"attention": 0.01, "experts": 0.014}
    sizes = Sizes(lambda s: 1000.0 * (s.piece[1] - s.piece[0]) if s.op is Op.GRADS else 6e5 * s.share / s.chunk[1])

    def took(s: Instruction) -> float:
        part = s.share / s.chunk[1] * (2 if s.phase == "B" else 1)
        return seconds.get(s.name, 0.0) * part if s.kind is Kind.COMPUTE else 0.0

    return ListClock(program, seconds=took, sizes=sizes, loads=Loads(one_level(6e7, 1e-3), RANKS), ranks_of=groups)


def of_a_step(evaluations: int, *, seed: int = 0, fits=None, finalists: int = 1) -> tuple[Found, Setting]:
    setting = Setting(SHAPE, buckets_of(SHAPE, piece=40), micro_batches=2)
    plans = [plan for plan in to_search_from(zero=False, piece_bytes=0, packing=1) if plan.parts <= 2]
    settings = [setting.under(plan) for plan in plans]
    starts = [Start(s.plan, training_step(s.plan.strategy, s)) for s in settings]
    return search(starts, clock_of_step, evaluations=evaluations, seed=seed, fits=fits, finalists=finalists), setting


def test_a_search_is_bounded_repeatable_and_no_worse_than_its_starts() -> None:
    found, setting = of_a_step(300)
    again, _ = of_a_step(300)
    assert found == again and found.evaluations <= 300
    assert found.step_s <= min(step_s for _, step_s in found.begun_s)
    assert {plan.strategy for plan, _ in found.begun_s} >= {"eager", "ddp", "serial", "flow", "lancet"}
    none, _ = of_a_step(1)
    assert none.evaluations == 2 * len(none.begun_s)
    assert none.step_s <= min(step_s for _, step_s in none.begun_s)
    other, _ = of_a_step(300, seed=1)
    assert other.plan.order != found.plan.order


def test_its_plan_gives_its_list_and_a_walk_from_the_beginning_takes_as_long() -> None:
    found, setting = of_a_step(1500)
    program = found.program
    credit, yields = [s.credit for s in program], [tuple(OPS[op] for op in s.yields_to) for s in program]
    assert clock_of_step(program).walk(range(len(program)), credit, yields).step_s == found.step_s
    under = setting.under(Plan.from_json(found.plan.as_json()))
    assert training_step(found.plan.strategy, under) == found.program
    check(found.program, given(found.program, under), under.buckets)


def test_lists_of_the_same_instructions_are_improved_as_one() -> None:
    """Whatever order their plans give them, and whatever they hold back."""
    setting = Setting(SHAPE, buckets_of(SHAPE, piece=40), micro_batches=2)
    clocks = list[Program]()

    def clock_of(program: Program) -> ListClock:
        clocks.append(program)
        return clock_of_step(program)

    settings = [setting.under(plan) for plan in (*(Plan(strategy=name) for name in ("serial", "eager", "priority")), FLOW)]
    starts = [Start(s.plan, training_step(s.plan.strategy, s)) for s in settings]
    found = search(starts, clock_of, evaluations=400)
    assert len(clocks) == 2  # `flow` has parts
    assert {plan.strategy: s for plan, s in found.begun_s} == {
        s.plan.strategy: clock_of_step(s.program)
        .walk(range(len(s.program)), [i.credit for i in s.program], [tuple(OPS[op] for op in i.yields_to) for i in s.program])
        .step_s
        for s in starts
    }
    same = search(starts[:3], clock_of, evaluations=1)
    best, best_s = min(same.begun_s, key=lambda one: one[1])
    assert (replace(same.plan, order=()), same.step_s) == (best, best_s) and best.strategy != "serial"  # the first of its family


def test_two_lists_or_more_are_not_all_in_as_many_parts() -> None:
    """What a part costs is known least, so lists of both kinds are there to be measured."""
    alone, _ = of_a_step(300)
    found, _ = of_a_step(300, finalists=2)
    first, second = found.finalists
    assert first.plan.parts != second.plan.parts
    assert first.step_s <= second.step_s and first.plan.parts == alone.plan.parts


def test_what_does_not_fit_is_not_taken() -> None:
    """Here: lists in which a bucket goes out before the backward pass has ended."""

    def last_gradients(program: Program) -> bool:
        tags = [s.phase for s in program if s.op is not Op.GRADS and s.phase != "U"]
        sent = [i for i, s in enumerate(program) if s.op is Op.GRADS and s.kind is Kind.START]
        return min(sent) > len(tags)

    found, _ = of_a_step(200, fits=last_gradients)
    assert last_gradients(found.program) and {plan.strategy for plan, _ in found.begun_s} == {"serial", "ddp"}
    with pytest.raises(ValueError, match="none of .* lists to begin with fits into memory"):
        of_a_step(200, fits=lambda program: False)
