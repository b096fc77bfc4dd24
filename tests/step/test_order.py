"""An order as text: there and back, refused where it is of another step; how far two orders are apart."""

from dataclasses import replace
from random import Random

import pytest

from megalina.step.list_scheduling import by_tails, guessed
from megalina.step.moves import blocks_swapped, pulled, pushed, shifted
from megalina.step.order import checksum, distance, names_of, order_of
from megalina.step.plan import Plan, WrongChecksum
from megalina.step.precedence import Precedence
from megalina.step.program import Kind, Op, Program, check
from megalina.step.strategy import STRATEGIES, Setting, given, training_step
from tests.perfmodel.sim.schedules import SHAPES, buckets_of, compute, setting_of, start, wait
from tests.perfmodel.sim.schedules import order_of as another_order

SHAPE = SHAPES["experts in every layer"]


def setting(plan: Plan, *, piece: int | None = 40, micro_batches: int = 2) -> Setting:
    return Setting(SHAPE, buckets_of(SHAPE, piece=piece), plan=plan, micro_batches=micro_batches)


def listed(plan: Plan) -> Program:
    return training_step(plan.strategy, setting(plan))


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_legal_order_of_a_strategys_list_goes_through_a_plan(name: str) -> None:
    random = Random(name)
    drawn = setting_of(name, SHAPE, random)
    program = training_step(name, drawn)
    other = another_order(program, random)
    plan = replace(drawn.plan, order=order_of(other))
    assert training_step(name, replace(drawn, plan=plan)) == other
    assert len(set(names_of(program))) == len(program)
    again = Plan.from_json(plan.as_json())
    assert again == plan and checksum(plan.order) in str(plan)


def test_what_is_held_back_is_part_of_an_order() -> None:
    program = listed(Plan("flow", parts=2))
    held = [replace(s, credit=2) if s.op is Op.TOKENS and s.kind is Kind.START else s for s in program]
    held = [replace(s, credit=1, yields_to=(Op.TOKENS,)) if s.op is Op.GRADS and s.kind is Kind.START else s for s in held]
    order = order_of(tuple(held))
    assert "B:dense.1>.-.0#1 credit=1 yields=TOKENS" in order and "F:dispatch>.0.1 credit=2" in order
    assert training_step("flow", setting(Plan("flow", parts=2, order=order))) == tuple(held)


def test_pieces_are_counted_so_their_sizes_may_differ() -> None:
    plan = Plan("eager", order=order_of(listed(Plan())))
    buckets = {name: replace(spec, numel=2 * spec.numel - 7, piece=80) for name, spec in setting(plan).buckets.items()}
    longer = replace(setting(plan), buckets=buckets)
    assert order_of(training_step("eager", longer)) == plan.order
    assert [s.tag for s in training_step("eager", longer)] != [s.tag for s in listed(Plan())]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda order: order[1:], "lacks U:sizes.-.0: it is of another step"),
        (lambda order: ("F:nothing.-.0", *order), "has F:nothing.-.0 which this step does not have"),
        (lambda order: (*order, order[3]), "twice"),
        (lambda order: (*order[:-1], f"{order[-1]} credit=two"), "is no line of an order"),
        (lambda order: (f"{order[0]} yields=TOKENS", *order[1:]), "holds back U:sizes.-.0, which sends nothing"),
        (lambda order: order[::-1], "before it is written"),
    ],
)
def test_an_order_of_another_step_is_refused(change, wrong: str) -> None:
    order = change(order_of(listed(Plan())))
    with pytest.raises(ValueError, match=wrong):
        training_step("eager", setting(Plan(order=order)))


def test_an_order_of_other_numbers_is_refused_with_what_differs() -> None:
    order = order_of(listed(Plan("flow", parts=2)))
    with pytest.raises(ValueError, match=r"has U:seed\.-\.\d.* which this step does not have|lacks"):
        training_step("flow", setting(Plan("flow", parts=4, order=order), micro_batches=4))


def test_an_order_that_was_changed_by_hand_is_no_plan() -> None:
    values = Plan("eager", order=order_of(listed(Plan()))).as_json()
    values["order"]["lines"][3], values["order"]["lines"][4] = values["order"]["lines"][4], values["order"]["lines"][3]
    with pytest.raises(WrongChecksum):
        Plan.from_json(values)


def test_distance_is_kendalls_tau() -> None:
    assert distance("abcd", "abcd") == 0 and distance("abcd", "dcba") == 1
    assert distance("abcd", "abdc") == pytest.approx(1 / 6) and distance("axbycd", "abdc") == pytest.approx(1 / 6)
    assert distance("a", "b") == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_moves_and_list_schedules_give_legal_lists(name: str) -> None:
    random = Random(name)
    drawn = setting_of(name, random.choice(list(SHAPES.values())), random)
    program = training_step(name, drawn)
    precedence = Precedence(program)
    moves = {
        "shifted": lambda order: shifted(order, precedence, random),
        "blocks_swapped": lambda order: blocks_swapped(order, precedence, random),
        "pulled": lambda order: pulled(order, random.randrange(len(order)), precedence, random),
        "pushed": lambda order: pushed(order, random.randrange(len(order)), precedence, random),
    }
    order, made = list(precedence.acts), dict.fromkeys(moves, 0)
    for _ in range(1000):
        kind = random.choice(list(moves))
        if (after := moves[kind](order)) is not None:
            made[kind] += after != order
            order = after
    assert precedence.legal(order) and min(made.values()) > 0
    for acts in (order, precedence.acts):
        check(tuple(program[i] for i in precedence.listed(acts)), given(program, drawn), drawn.buckets)
    by_times = by_tails(program, [guessed(s) * random.random() for s in program])
    check(by_times, given(program, drawn), drawn.buckets)


def test_a_list_schedule_keeps_micro_batches_together() -> None:
    """Else all forward passes would come first, and all their activations be held."""
    shape = replace(SHAPE, layers=SHAPE.layers * 4, moe=SHAPE.moe * 4)
    many = Setting(shape, buckets_of(shape), micro_batches=6)
    tags = [s.tag for s in training_step("search", many)]
    assert tags.index("B:attention.0.0") < tags.index("F:attention.0.3")


def test_a_wait_for_which_another_is_needed_comes_after_it() -> None:
    first, second = start("a"), start("b")
    both = replace(wait("b"), reads=("b>", "a."))
    program = (first, second, wait("a"), both, compute("c", reads="b."))
    precedence = Precedence(program)
    assert precedence.listed([1, 0, 4]) == [1, 0, 2, 3, 4]
    assert not precedence.legal([1, 4, 0])
