"""The check over the programs of all pipeline ranks together: whatever one starts along an axis that several are on, the others
start too, in the same order, and no circle of waiting closes."""

from collections.abc import Mapping, Sequence

from megalina.step.pipeline.fill import ends_of
from megalina.step.program import MIRRORED_OP, Instruction, Kind, Op, Program

WORLD, MEASURE = "world", "U:measure.-.0"
POINT_TO_POINT = (Op.SEND, Op.RECV)


def check_together(of_ranks: Sequence[Program], axes: Mapping[str, Sequence[int]] = {}) -> None:
    """Raise ValueError, with pipeline rank, position and instruction, unless the programs fit together.

    Each is one that `megalina.step.program.check` accepts.  `axes`: further axes that span pipeline ranks, such as that of a
    bucket which several of them use, with these ranks; "world" spans all, and an axis between two ranks those two.  Any other
    axis is of ranks that hold one and the same program, so its order is one.

    A WAIT ends once all ranks of its axis have started what it waits for, so a SEND is one for its RECV too (rendezvous).
    Where a step is measured the ranks' logs of collectives are compared, so what comes before that on one rank does on all."""
    members = {WORLD: tuple(range(len(of_ranks))), **{axis: tuple(ranks) for axis, ranks in axes.items()}}
    for program in of_ranks:
        for instruction in program:
            if ends := ends_of(instruction.axis):
                members[instruction.axis] = ends
    for axis, ranks in members.items():
        _check_axis(axis, ranks, of_ranks)
        _check_compared(axis, ranks, of_ranks)
    _check_end(of_ranks, members)


def _check_axis(axis: str, ranks: Sequence[int], of_ranks: Sequence[Program]) -> None:
    if unknown := [rank for rank in ranks if not 0 <= rank < len(of_ranks)]:
        raise ValueError(f"axis {axis} has pipeline rank {unknown[0]}, and there are {len(of_ranks)} ranks")
    first, *others = ranks
    started = _starts(of_ranks[first], axis)
    for other in others:
        theirs = _starts(of_ranks[other], axis)
        for (position, own), (there, met) in zip(started, theirs):
            if _met_by(own) != _sent(met):
                raise ValueError(
                    f"rank {first} at position {position}, {_text(own)}, meets {_text(met)} of rank {other} at position {there}: "
                    f"along axis {axis} they start things in different orders"
                )
        if len(started) != len(theirs):
            longer, extra = (first, started) if len(started) > len(theirs) else (other, theirs)
            position, left = extra[min(len(started), len(theirs))]
            raise ValueError(f"rank {longer} at position {position}, {_text(left)}: nobody on axis {axis} starts the same")


def _check_compared(axis: str, ranks: Sequence[int], of_ranks: Sequence[Program]) -> None:
    first, *others = ranks
    own = _started_before_measure(of_ranks[first], axis)
    for other in others:
        theirs = _started_before_measure(of_ranks[other], axis)
        if own != theirs:
            raise ValueError(
                f"rank {first} starts {own} things along axis {axis} before {MEASURE}, and rank {other} {theirs}: there the logs "
                "of collectives are compared, and would differ"
            )


def _started_before_measure(program: Program, axis: str) -> int | None:
    """None: of an evaluation, which compares nothing."""
    place = next((i for i, s in enumerate(program) if s.tag == MEASURE), None)
    return None if place is None else sum(position < place for position, _ in _starts(program, axis))


def _starts(program: Program, axis: str) -> list[tuple[int, Instruction]]:
    return [(i, s) for i, s in enumerate(program) if s.kind is Kind.START and s.axis == axis]


def _sent(instruction: Instruction) -> tuple:
    return instruction.phase, instruction.op, *instruction.key, instruction.piece


def _met_by(instruction: Instruction) -> tuple:
    """What the START of another rank on the axis is."""
    op = MIRRORED_OP[instruction.op] if instruction.op in POINT_TO_POINT else instruction.op
    return instruction.phase, op, *instruction.key, instruction.piece


def _text(instruction: Instruction) -> str:
    return f"{instruction.tag} ({instruction.op.name})" if instruction.op is not None else instruction.tag


def _check_end(of_ranks: Sequence[Program], members: Mapping[str, Sequence[int]]) -> None:
    """Walk all programs; a rank stands still at a WAIT until every rank of the axis has started what it waits for."""
    numbers = [_numbers(program, members) for program in of_ranks]
    started = [dict.fromkeys(members, 0) for _ in of_ranks]
    at = [0] * len(of_ranks)

    def late(rank: int) -> int | None:
        """The rank that the one waits for; None: it can go on."""
        instruction = of_ranks[rank][at[rank]]
        if instruction.kind is not Kind.WAIT or instruction.axis not in members:
            return None
        number = numbers[rank][instruction.reads[0]]
        return next((other for other in members[instruction.axis] if started[other][instruction.axis] <= number), None)

    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(of_ranks):
            while at[rank] < len(program) and late(rank) is None:
                instruction = program[at[rank]]
                if instruction.kind is Kind.START and instruction.axis in members:
                    started[rank][instruction.axis] += 1
                at[rank] += 1
                moved = True
    standing = [rank for rank, program in enumerate(of_ranks) if at[rank] < len(program)]
    if not standing:
        return
    way: list[int] = []
    waiting: int | None = standing[0]
    while waiting is not None and waiting not in way:
        way.append(waiting)
        waiting = late(waiting)
    assert waiting is not None, "orders along axes are the same, so what is waited for comes"
    ring = way[way.index(waiting) :]
    lines = [
        f"rank {rank} at position {at[rank]}, {_text(of_ranks[rank][at[rank]])}, waits for rank {late(rank)}" for rank in ring
    ]
    raise ValueError(f"the programs never end: {'; '.join(lines)}")


def _numbers(program: Program, members: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """By the value on the wire: how many things were started along its axis before it."""
    counts, out = dict.fromkeys(members, 0), {}
    for instruction in program:
        if instruction.kind is Kind.START and instruction.axis in members:
            out[instruction.writes[0]] = counts[instruction.axis]
            counts[instruction.axis] += 1
    return out
