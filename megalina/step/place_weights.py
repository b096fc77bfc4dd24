"""A pass: deferred weight gradients go under all-to-alls (Lancet, section 4.1 and algorithm 1)."""

from collections.abc import Callable, Sequence

from megalina.step.program import Instruction, Kind, Program, has_gradient
from megalina.step.turns import sends_tokens

Seconds = Callable[[Instruction], float]


def place_weights(
    program: Program,
    seconds: Seconds,
    *,
    kept_bytes: Callable[[Instruction], int] = lambda instruction: 0,
    most_bytes: float = float("inf"),
    stays: Callable[[Instruction], bool] = lambda instruction: False,
    queued: bool = False,
) -> Program:
    """Put deferred weight gradients under all-to-alls that nothing they need or give joins (Lancet, section 4.1 and algorithm 1).

    All-to-alls come in the order of the list.  Each is covered by the weight gradients that fit what it leaves of its time best,
    among those whose mirrors have run: until it is covered, or the best takes more than twice of what is left.  The last one
    gets all that still wait, and so does the last one of a forward pass, so that no more than one micro-batch's ever wait; those
    whose mirrors run after the last one stay at the end.  Contributions to one weight keep their order, so sums keep their bits.

    `seconds`: of compute, and from START to WAIT for an exchange; `kept_bytes`: what a mirror keeps back for its weight
    gradients; beyond `most_bytes` the oldest are placed first, whatever they take; `stays`: weight gradients that are left where
    they are; `queued`: all-to-alls wait for one another on the wire, so where it is the limit one leaves more idle than it takes.
    """
    waiting: list[Instruction] = []  # all of whose mirrors have run, the oldest first
    left_by = {v: s for s in program if s.phase == "B" and s.late for v in s.writes if not has_gradient(v)}
    weight_of = {v: w for w in program if w.phase == "W" for v in w.reads}
    base = [s for s in program if s.phase != "W" or stays(s)]
    exposed_s = _queued_exposed(base, seconds) if queued else _exposed(base, seconds)
    last = _last_of_each_pass(base)
    out: list[Instruction] = []
    left: set[str] = set()  # by mirrors that have run

    def kept() -> int:
        return sum(kept_bytes(left_by[v]) for v in left)

    def put(weight: Instruction) -> None:
        waiting.remove(weight)
        left.difference_update(weight.reads)
        out.append(weight)

    for i, instruction in enumerate(base):
        out.append(instruction)
        own = next((v for v in instruction.writes if not has_gradient(v)), "") if instruction.phase == "B" else ""
        if own and not stays(weight_of[own]):
            left.add(own)
            waiting += [weight_of[own]] if left.issuperset(weight_of[own].reads) else []
            while waiting and (not last or kept() > most_bytes):
                put(waiting[0])
        if sends_tokens(instruction):
            left_s, placed = exposed_s[i], False
            while left_s > 0 and (ready := _oldest_of_each(waiting)):
                best = min(ready, key=lambda w: abs(left_s - seconds(w)))
                if placed and seconds(best) > 2 * left_s:
                    break
                put(best)
                left_s, placed = left_s - seconds(best), True
        if i in last:
            while waiting:
                put(waiting[0])
    return (*out, *waiting)


def _last_of_each_pass(program: Sequence[Instruction]) -> set[int]:
    """Places of the last START of tokens before each backward pass, and in the list."""
    out, begun, sent, before = set[int](), set[str](), -1, ""
    for i, instruction in enumerate(program):
        if instruction.phase == "B":
            micro_batch = instruction.part.partition("c")[0].partition("p")[0]
            if before != "B" and micro_batch not in begun:
                out.add(sent)
            begun.add(micro_batch)
        sent = i if sends_tokens(instruction) else sent
        before = instruction.phase
    return (out | {sent}) - {-1}


def _exposed(program: Sequence[Instruction], seconds: Seconds) -> dict[int, float]:
    """Of each START of tokens: what it takes longer than that which is computed until it is waited for."""
    out, sent = {}, {s.writes[0]: i for i, s in enumerate(program) if sends_tokens(s)}
    computed_s = [0.0]
    for instruction in program:
        computed_s.append(computed_s[-1] + (seconds(instruction) if instruction.kind is Kind.COMPUTE else 0.0))
    for i, instruction in enumerate(program):
        if instruction.kind is Kind.WAIT and instruction.carries_tokens:
            start = sent[instruction.reads[0]]
            out[start] = max(0.0, seconds(program[start]) - (computed_s[i] - computed_s[start]))
    return out


def _queued_exposed(program: Sequence[Instruction], seconds: Seconds) -> dict[int, float]:
    """Of each START of tokens: how long the device stands at its WAIT, if one is on the wire at a time."""
    out, on_wire = {}, dict[str, tuple[int, float]]()
    device_s = wire_s = 0.0
    for i, instruction in enumerate(program):
        if instruction.kind is Kind.COMPUTE:
            device_s += seconds(instruction)
        elif sends_tokens(instruction):
            wire_s = max(device_s, wire_s) + seconds(instruction)
            on_wire[instruction.writes[0]] = i, wire_s
        elif instruction.kind is Kind.WAIT and instruction.carries_tokens:
            start, arrives_s = on_wire.pop(instruction.reads[0])
            out[start] = max(0.0, arrives_s - device_s)
            device_s = max(device_s, arrives_s if arrives_s < float("inf") else 0.0)
    return out


def _oldest_of_each(weights: Sequence[Instruction]) -> list[Instruction]:
    """Of those that add to the same weights, the first."""
    first: dict[tuple[str, int], Instruction] = {}
    for weight in weights:
        first.setdefault((weight.name, weight.layer), weight)
    return list(first.values())
