"""Turns of parts: three or more turn round one after another, so that nobody waits between forward and backward."""

import pytest

from megalina.perfmodel.sim.list_clock import OPS, ListClock
from megalina.perfmodel.sim.network import Loads, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.forward import plain
from megalina.step.passes import rename_part, step
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op, Program, backward, check
from megalina.step.strategy import Setting, given, training_step
from megalina.step.turns import there_and_back
from tests.perfmodel.sim.schedules import SHAPES, buckets_of

TWO_LAYERS = SHAPES["experts in every layer"]
RANKS = {"ep": (0, 1), "edp": (0,), "dp": (0, 1), "dense": (0, 1), "world": (0, 1)}
PART_S, EXCHANGE_S = 0.010, 0.004  # of an instruction that computes; of tokens


def setting_of(shape_name: str, parts: int, **numbers: object) -> Setting:
    shape = SHAPES[shape_name]
    return Setting(shape, buckets_of(shape), Plan("flow", parts=parts, **numbers))  # type: ignore[arg-type]


def of_part(program: Program, part: int) -> list[tuple[str, str]]:
    return [(s.phase, s.tag) for s in program if s.part == str(part) and s.phase in "FB" and s.op is not Op.GRADS]


def test_every_part_keeps_its_own_order() -> None:
    parts = [rename_part(plain(TWO_LAYERS), str(i), 1 / 4) for i in range(4)]
    woven = there_and_back(parts, [()] * 4)
    assert len(woven) == sum(len(p) + len(backward(p)) for p in parts)
    for part, own in enumerate(parts):
        assert of_part(woven, part) == [(s.phase, s.tag) for s in (*own, *backward(own))]
    assert all(s.credit == 1 for s in woven if s.carries_tokens)


@pytest.mark.parametrize("parts", [3, 4, 8])
def test_each_turns_round_while_others_compute(parts: int) -> None:
    program = training_step("flow", setting_of("experts in every layer", parts))
    place = {s.tag: i for i, s in enumerate(program)}
    for part in range(parts - 2):  # behind the experts of the next one, before those of the one after it
        assert place[f"F:experts.1.{part + 1}"] < place[f"F:loss.-.{part}"] < place[f"B:combine>.1.{part}"]
        assert place[f"B:combine>.1.{part}"] < place[f"F:experts.1.{part + 2}"]
    assert place[f"F:experts.1.{parts - 1}"] < place["B:experts.1.0"] < place[f"F:loss.-.{parts - 2}"]
    assert [s.part for s in program if s.name == "experts" and s.phase == "B" and s.layer == 1] == list(map(str, range(parts)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("late", ["none", "all"])
def test_all_models_can(shape: str, late: str) -> None:
    """`training_step` checks the list."""
    setting = setting_of(shape, 4, deferred_weights=late)
    program = training_step("flow", setting)
    check(program, given(program, setting), setting.buckets)
    assert {s.part for s in program if s.phase == "F"} >= set("0123")


def seconds(instruction: Instruction) -> float:
    return PART_S if instruction.kind is Kind.COMPUTE and instruction.name in ("attention", "experts") else 0.0


def idle_s(program: Program) -> float:
    """In virtual time; all but tokens takes none on the wire."""
    sizes = Sizes(lambda s: EXCHANGE_S if s.op is Op.TOKENS else 0.0)
    loads = Loads(one_level(0.5, 0.0), 2)  # each rank keeps half of its rows
    clock = ListClock(program, seconds=seconds, sizes=sizes, loads=loads, ranks_of=lambda axis, rank: RANKS.get(axis, (0,)))
    yields = [tuple(OPS[op] for op in s.yields_to) for s in program]
    return sum(s for _, s in clock.walk(range(len(program)), [s.credit for s in program], yields).idle)


def test_nobody_waits_at_the_turn() -> None:
    """With a mirror of forward they wait for the last tokens of forward, and for the first ones of backward."""
    forward = plain(TWO_LAYERS)
    mirrored, turning = (step(forward, 4, together=4, share=1 / 4, turns_round=turns) for turns in (False, True))
    assert idle_s(turning) == pytest.approx(0.0, abs=1e-9)
    assert idle_s(mirrored) == pytest.approx(2 * EXCHANGE_S)
