"""The checker refuses every single instruction that is dropped, doubled, changed or in a wrong place, over whole lists of every
strategy, and accepts every order of a list in which values are written before they are read.

.venv/bin/python -m pytest tests/step/test_mutations.py -m 'full or not full' -rP     # prints how many lists were tried
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from megalina.step.program import MOVABLE, Instruction, Kind, Op, Program, check, is_mirrored, reads_of, writes_of
from megalina.step.strategy import STRATEGIES, Setting, given, training_step
from tests.perfmodel.sim.schedules import OF_OTHER_PASSES, SHAPES, WALKING, buckets_of, order_of, setting_of

PASSING = -1  # instead of a seed: parts of a micro-batch that is one group of its routers
Mutants = Iterator[tuple[str, Program]]  # what was done, the list after it

# every number of a setting is drawn
cases = [
    pytest.param(name, seed, marks=[pytest.mark.full] * (seed > 0 or name not in OF_OTHER_PASSES))
    for name in STRATEGIES
    for seed in range(20)
]
cases += [pytest.param(name, PASSING, marks=[pytest.mark.full] * (name != "flow")) for name in WALKING]
every_list = pytest.mark.parametrize(("name", "seed"), cases)


@pytest.fixture(scope="module")
def tried() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    print(f"\nlists tried: {counts.total()}, {dict(counts)}")


def list_of(name: str, seed: int) -> tuple[Program, Setting]:
    """A list with every mechanism of its strategy, in a shape and with numbers that are drawn."""
    random = Random(f"{name} {seed}")
    setting = setting_of(name, random.choice(list(SHAPES.values())), random)
    if seed == PASSING:
        shape = replace(SHAPES["experts in every layer"], micro_batch_groups=True)
        setting = setting_of(name, shape, random)
        setting = replace(setting, micro_batches=1, plan=replace(setting.plan, parts=2))
        assert any(s.name == "balance_of_group" for s in training_step(name, setting))
    return training_step(name, setting), setting


def refused(program: Program, original: Program, setting: Setting) -> bool:
    try:
        check(program, given(original, setting), setting.buckets)
    except ValueError:
        return True
    return False


def accepted(mutants: Mutants, program: Program, setting: Setting, tried: Counter[str]) -> list[str]:
    """Which of these the checker lets pass.  There must be some to try."""
    found, count = [], 0
    for what, mutant in mutants:
        assert mutant != program, what
        count += 1
        if not refused(mutant, program, setting):
            found.append(what)
    assert count > 0
    tried["refused"] += count
    return found


def changed(program: Program, i: int, **values: object) -> Program:
    return (*program[:i], replace(program[i], **values), *program[i + 1 :])  # type: ignore[arg-type]


@every_list
def test_each_dropped_instruction_is_refused(name: str, seed: int, tried: Counter[str]) -> None:
    program, setting = list_of(name, seed)
    dropped = ((s.tag, program[:i] + program[i + 1 :]) for i, s in enumerate(program))
    assert accepted(dropped, program, setting, tried) == []


@every_list
def test_each_doubled_instruction_is_refused(name: str, seed: int, tried: Counter[str]) -> None:
    program, setting = list_of(name, seed)

    def doubled() -> Mutants:
        for i, instruction in enumerate(program):
            yield f"{instruction.tag} twice", program[: i + 1] + program[i:]
            yield f"{instruction.tag} again at the end", (*program, instruction)

    assert accepted(doubled(), program, setting, tried) == []


@every_list
def test_each_swap_that_breaks_a_dependence_is_refused(name: str, seed: int, tried: Counter[str]) -> None:
    """Each instruction changes places with the first and the last of those that need it, and with the last that it needs."""
    program, setting = list_of(name, seed)
    writers: dict[str, list[int]] = {}
    for i, instruction in enumerate(program):
        for value in writes_of(instruction):
            writers.setdefault(value, []).append(i)
    needs = [sorted({i for value in reads_of(s) for i in writers.get(value, ())}) for s in program]
    needed_by: dict[int, list[int]] = {}
    for j, before in enumerate(needs):
        for i in before:
            needed_by.setdefault(i, []).append(j)
    pairs = {(i, j) for i, after in needed_by.items() for j in (after[0], after[-1])}
    pairs |= {(before[-1], j) for j, before in enumerate(needs) if before}
    assert {i for pair in pairs for i in pair} == set(range(len(program)))  # every instruction of a step needs or is needed

    def swapped() -> Mutants:
        for i, j in sorted(pairs):
            mutant = list(program)
            mutant[i], mutant[j] = mutant[j], mutant[i]
            yield f"{program[i].tag} and {program[j].tag}", tuple(mutant)

    assert accepted(swapped(), program, setting, tried) == []


def wrong(instruction: Instruction, setting: Setting) -> Iterator[dict[str, object]]:
    """Single fields of an instruction that must not be what they are made."""
    start, stop = instruction.piece
    if instruction.kind is Kind.COMPUTE:
        yield {"yields_to": (Op.TOKENS,)}
        yield {"credit": 1}
        if instruction.phase == "B":
            yield {"recompute": not instruction.recompute}
            yield {"chunk": (instruction.chunk[0], instruction.chunk[1] + 1)}
        return
    yield {"axis": "ep" if instruction.axis != "ep" else "dp"}
    yield {"op": Op.SUM if instruction.op is not Op.SUM else Op.GATHER}
    if instruction.op not in MOVABLE:
        yield {"yields_to": (Op.GRADS,)}
        yield {"yields_to": (Op.COUNTS,)}
        yield {"layer": instruction.layer + 1}
        yield {"part": f"{instruction.part}9"}
        yield {"chunk": (instruction.chunk[0], instruction.chunk[1] + 1)}
        yield {"chunk": (instruction.chunk[0] + 1, instruction.chunk[1])}
        return
    yield {"yields_to": (Op.GRADS,)}
    yield {"yields_to": (Op.TOKENS, Op.PARAMS)}
    if instruction.axis in ("dp", "world"):
        yield {"yields_to": (Op.SUM,)}  # the step's own sums stand in these lanes too, behind what is held back
    yield from ({"piece": piece} for piece in ((start + 1, stop + 1), (start + 1, stop), (start, stop - 1), (start, stop + 1)))
    yield {"name": next(name for name in setting.buckets if name not in instruction.buckets)}
    if instruction.kind is Kind.WAIT:
        yield {"yields_to": (Op.TOKENS,)}


@pytest.mark.sampled(3)
@every_list
def test_each_changed_instruction_is_refused(name: str, seed: int, tried: Counter[str]) -> None:
    """Axis, class, piece, part, chunk; what may not be held back, or not by that."""
    program, setting = list_of(name, seed)
    mutants = (
        (f"{instruction.tag} with {values}", changed(program, i, **values))
        for i, instruction in enumerate(program)
        for values in wrong(instruction, setting)
    )
    assert accepted(mutants, program, setting, tried) == []


@every_list
def test_each_exchange_that_is_changed_at_both_ends_is_refused(name: str, seed: int, tried: Counter[str]) -> None:
    """Dropped, or sent along another axis; of buckets also: other elements."""
    program, setting = list_of(name, seed)
    waits = {s.reads[0]: i for i, s in enumerate(program) if s.kind is Kind.WAIT}

    def both_changed() -> Mutants:
        for i, instruction in enumerate(program):
            if instruction.kind is not Kind.START:
                continue
            j, (start, stop) = waits[instruction.writes[0]], instruction.piece
            yield f"{instruction.tag} and its wait dropped", tuple(s for k, s in enumerate(program) if k not in (i, j))
            changes: list[dict[str, object]] = []
            if (
                instruction.phase == "B" or is_mirrored(instruction) or instruction.op is Op.PARAMS
            ):  # of others the list alone says the axis
                changes += [{"axis": "edp"}]
            if instruction.op in MOVABLE:
                changes += [{"piece": piece} for piece in ((start + 1, stop + 1), (start + 1, stop), (start, stop + 1))]
            for values in changes:
                yield f"{instruction.tag} with {values}", changed(changed(program, i, **values), j, **values)

    assert accepted(both_changed(), program, setting, tried) == []


@every_list
def test_a_backward_exchange_without_forward_is_refused(name: str, seed: int) -> None:
    program, setting = list_of(name, seed)
    sent = Instruction("B", Kind.START, "more", writes=("more>'",), op=Op.TOKENS, axis="ep")
    came = replace(sent, kind=Kind.WAIT, reads=("more>'",), writes=("more'",))
    with pytest.raises(ValueError, match="backward without forward: B:more>.-.0, B:more<.-.0"):
        check((*program, sent, came), given(program, setting), setting.buckets)


@every_list
def test_each_legal_order_is_accepted(name: str, seed: int, tried: Counter[str]) -> None:
    program, setting = list_of(name, seed)
    for other in range(5):
        order = order_of(program, Random(other))
        assert order != program and sorted(map(repr, order)) == sorted(map(repr, program))
        check(order, given(program, setting), setting.buckets)
        tried["accepted"] += 1


@every_list
def test_a_batch_that_nobody_reads_is_refused(name: str, seed: int) -> None:
    program, setting = list_of(name, seed)
    with pytest.raises(ValueError, match="nobody reads #batch.-.99: part of the step's data"):
        check(program, given(program, setting) | {"#batch.-.99"}, setting.buckets)


@every_list
def test_a_value_with_two_writers_is_refused(name: str, seed: int) -> None:
    program, setting = list_of(name, seed)
    again = Instruction("U", Kind.COMPUTE, "again", writes=("#own_divisor.-.0",))
    with pytest.raises(ValueError, match="#own_divisor.-.0 is written by U:again.-.0, U:sizes.-.0; only gradients add up"):
        check((again, *program), given(program, setting), setting.buckets)


@pytest.mark.parametrize("sharded", [False, True])
def test_pieces_may_be_cut_elsewhere_unless_shards_belong_to_them(sharded: bool) -> None:
    shape = SHAPES["experts in every layer"]
    setting = Setting(shape, buckets_of(shape, sharded=sharded, piece=40))
    program = training_step("eager", setting)
    elsewhere = {(0, 40): (0, 32), (40, 64): (32, 64)}
    first = next(iter(setting.buckets))
    assert setting.buckets[first].numel == 64

    def moved(instruction: Instruction) -> Instruction:
        return (
            replace(instruction, piece=elsewhere[instruction.piece])
            if instruction.name == first and instruction.op in MOVABLE
            else instruction
        )

    assert sum(moved(s) != s for s in program) == 4 * (1 + sharded)
    assert refused(tuple(map(moved, program)), program, setting) == sharded
    joined = [replace(s, piece=(0, 64)) if moved(s) != s else s for s in program if moved(s) == s or s.piece[0] == 0]
    assert refused(tuple(joined), program, setting) == sharded
