"""List scheduling: an order of a step's instructions, made at one go by priorities.

Whenever the device is free it takes what is ready and has the highest priority; by default that is what has the longest tail
behind it, on the device and on the wire (Graham's list scheduling; Coffman and Bruno, Computer and Job-Shop Scheduling Theory,
1976).  One thing is on the wire at a time here, in the order in which it was asked for: a rough picture that yields good
beginnings for a search, which then counts exactly.
"""

from collections.abc import Mapping, Sequence

from megalina.step.precedence import Precedence
from megalina.step.program import MOVABLE, Instruction, Kind, Op, Program

HORIZON = 120  # acts


def tails(precedence: Precedence, seconds: Sequence[float]) -> list[float]:
    """Of each act: its own time and the longest chain of those that need it."""
    out = [0.0] * len(seconds)
    for act in reversed(precedence.acts):
        out[act] = seconds[act] + max((out[later] for later in precedence.after[act]), default=0.0)
    return out


def schedule(
    precedence: Precedence,
    seconds: Sequence[float],
    priority: Sequence[float],
    *,
    backlog_s: float = float("inf"),
    horizon: int = HORIZON,
) -> list[int]:
    """Acts in order.  `seconds`: of compute, and of a START alone on the wire.

    What is further than `horizon` acts behind the first that is left, in the list's own order, has to wait: else the forward
    passes of all micro-batches would come first, and their activations would be held.  Gradients and parameters are asked for
    only while what is on the wire already takes no longer than `backlog_s`, unless there is nothing to compute."""
    program = precedence.program
    sends = [program[i].kind is Kind.START for i in range(len(program))]
    movable = [sends[i] and program[i].op in MOVABLE for i in range(len(program))]
    arrives = {s.reads[0]: i for i, s in enumerate(program) if s.kind is Kind.WAIT}
    start_of = {arrives[s.writes[0]]: i for i, s in enumerate(program) if s.kind is Kind.START}  # of a WAIT
    awaited = [[start_of[w] for w in precedence.waits[i]] for i in range(len(program))]
    missing = [len(precedence.before[i]) for i in range(len(program))]
    came_s: dict[int, float] = {}  # of STARTs that have been asked for
    computes = [i for i in precedence.acts if not missing[i] and not sends[i]]
    starts = [i for i in precedence.acts if not missing[i] and sends[i]]
    now_s = wire_s = 0.0
    out: list[int] = []
    place = {act: i for i, act in enumerate(precedence.acts)}
    is_done, first = bytearray(len(place)), 0

    def done(act: int) -> None:
        nonlocal first
        out.append(act)
        is_done[place[act]] = 1
        while first < len(is_done) and is_done[first]:
            first += 1
        for later in precedence.after[act]:
            missing[later] -= 1
            if not missing[later]:
                (starts if sends[later] else computes).append(later)

    def ready_s(act: int) -> float:
        return max((came_s[s] for s in awaited[act]), default=0.0)

    while computes or starts:
        asked = True
        while asked:
            asked = False
            for start in sorted(starts, key=lambda i: (-priority[i], i)):
                if movable[start] and wire_s - now_s > backlog_s and computes:
                    continue
                starts.remove(start)
                wire_s = max(wire_s, now_s, ready_s(start)) + seconds[start]
                came_s[start] = wire_s
                done(start)
                asked = True
        if not computes:
            continue
        near = [i for i in computes if place[i] < first + horizon] or computes
        ready = [i for i in near if ready_s(i) <= now_s]
        if not ready:
            now_s = min(map(ready_s, near))
            continue
        act = min(ready, key=lambda i: (-priority[i], i))
        computes.remove(act)
        now_s += seconds[act]
        done(act)
    return out


GUESS_S: Mapping[Op | None, float] = {None: 1.0, Op.TOKENS: 1.0, Op.GRADS: 0.5}  # where no times are known; all else takes none


def guessed(instruction: Instruction) -> float:
    """A time where none is known: what computes with weights takes one, tokens as long, gradients half of it."""
    if instruction.kind is Kind.WAIT or (instruction.kind is Kind.COMPUTE and not instruction.uses):
        return 0.0
    return GUESS_S.get(instruction.op, 0.0) * instruction.share / instruction.chunk[1]


def by_tails(program: Program, seconds: Sequence[float]) -> Program:
    """The list by longest tails."""
    precedence = Precedence(program)
    acts = schedule(precedence, seconds, tails(precedence, seconds))
    return tuple(program[i] for i in precedence.listed(acts))
