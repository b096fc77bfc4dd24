"""Random legal orders of the programs of all pipeline ranks."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from random import Random

from megalina.step.pipeline.fill import ends_of
from megalina.step.pipeline.together import MEASURE, WORLD
from megalina.step.program import Instruction, Kind, Program, reads_of, writes_of

Node = tuple[int, int]  # rank, position in its program


def reordered(
    of_ranks: Sequence[Program], axes: Mapping[str, Sequence[int]], random: Random, *, keep_sums: bool
) -> tuple[Program, ...]:
    """Any order that `check` and `check_together` accept may come out: all ranks' instructions are drawn one after another, each
    when what it reads is there, and a START along an axis that several ranks are on is drawn for all of them at once, before they
    measure the step.

    `axes`: as of `check_together`.  `keep_sums`: what is added up is added in the old order, so sums keep their bits."""
    acts: dict[Hashable, list[Node]] = defaultdict(list)
    act_of: dict[Node, Hashable] = {}
    for rank, program in enumerate(of_ranks):
        for position, instruction in enumerate(program):
            act = act_of[rank, position] = _shared(instruction, axes) or (rank, position)
            acts[act].append((rank, position))
    needs: dict[Hashable, set[Hashable]] = {act: set() for act in acts}
    for rank, program in enumerate(of_ranks):
        for before, after in _edges(program, keep_sums=keep_sums):
            needs[act_of[rank, after]].add(act_of[rank, before])
        measure = next(i for i, s in enumerate(program) if s.tag == MEASURE)
        needs[rank, measure] |= {act_of[rank, i] for i in range(measure) if act_of[rank, i] != (rank, i)}
    needed_by: dict[Hashable, list[Hashable]] = defaultdict(list)
    for act, of in needs.items():
        for other in of:
            needed_by[other].append(act)
    missing = {act: len(of) for act, of in needs.items()}
    free = [act for act, count in missing.items() if not count]
    out: list[list[Instruction]] = [[] for _ in of_ranks]
    while free:
        at = random.randrange(len(free))
        free[at], free[-1] = free[-1], free[at]
        act = free.pop()
        for rank, position in acts[act]:
            out[rank].append(of_ranks[rank][position])
        for after in needed_by[act]:
            missing[after] -= 1
            free += [after] if not missing[after] else []
    assert list(map(len, out)) == list(map(len, of_ranks)), "what ranks need of one another goes round in a circle"
    return tuple(map(tuple, out))


def _shared(instruction: Instruction, axes: Mapping[str, Sequence[int]]) -> Hashable:
    """The same for what the ranks of an axis start together; None: the rank starts it by itself."""
    spans = ends_of(instruction.axis) or instruction.axis == WORLD or instruction.axis in axes
    if instruction.kind is not Kind.START or not spans:
        return None
    return instruction.axis, instruction.phase, instruction.key, instruction.piece


def _edges(program: Program, *, keep_sums: bool) -> list[tuple[int, int]]:
    """Which position must come before which."""
    writers: dict[str, list[int]] = defaultdict(list)
    for i, instruction in enumerate(program):
        for value in writes_of(instruction):
            writers[value].append(i)
    edges = [(j, i) for i, s in enumerate(program) for value in reads_of(s) for j in writers.get(value, ())]
    if keep_sums:
        edges += [pair for of in writers.values() for pair in zip(of, of[1:])]
    return edges
