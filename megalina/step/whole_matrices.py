"""Directions of matrices that are updated as wholes: their instructions, and where these stand in the list."""

from collections.abc import Mapping
from dataclasses import replace

from megalina.step.program import VERDICT, BucketSpec, Instruction, Kind, Op, Program, direction_of, gradient


def gathered_momentum(name: str) -> tuple[Instruction, Instruction, Instruction]:
    """What the directions of matrices that tp cuts are made of: found, sent, there."""
    own, wire = f"#momentum {name}", f"#momentum> {name}"
    found = Instruction("U", Kind.COMPUTE, f"momentum {name}", reads=(f"{gradient(name)}sum", VERDICT), writes=(own,))
    start = Instruction("U", Kind.START, f"momentum {name}", reads=(own,), writes=(wire,), op=Op.GATHER, axis="tp")
    return found, start, replace(start, kind=Kind.WAIT, reads=(wire,), writes=(f"#whole {name}",))


def orthogonal(name: str, bucket: BucketSpec) -> Instruction:
    """The directions of a bucket's matrices, from gradients or from what is there of whole momenta."""
    whole = (f"#whole {name}",) if bucket.is_gathered else ()
    reads = (f"{gradient(name)}sum", VERDICT, *whole)
    return Instruction("U", Kind.COMPUTE, f"newton_schulz {name}", reads=reads, writes=(direction_of(name),))


def place_newton_schulz(program: Program, buckets: Mapping[str, BucketSpec], after: int) -> Program:
    """Directions of whole matrices before the verdict: those of a bucket are made once its gradients are summed.

    A bucket's gradients are awaited, and its matrices made orthogonal, under the `after`-th START of tokens behind the last of
    its gradients; where so many don't come any more, one bucket's are made while the next ones' gradients are on the wire.
    Nobody knows yet by what clipping multiplies gradients, so directions are those of gradients as they are: an update makes them
    again where clipping acts.  No number changes.  What is sent with other buckets is awaited with them, at the end."""
    names = {name for name, bucket in buckets.items() if bucket.matrices}
    making = {f"newton_schulz {name}": name for name in names} | {f"momentum {name}": name for name in names}
    groups: dict[str, list[Instruction]] = {name: [] for name in names}
    awaited: dict[str, list[Instruction]] = {name: [] for name in names}
    base: list[Instruction] = []
    for instruction in program:
        if instruction.phase == "U" and (name := making.get(instruction.name)) is not None:
            groups[name].append(replace(instruction, reads=tuple(v for v in instruction.reads if v != VERDICT)))
        elif instruction.op is Op.GRADS and instruction.kind is Kind.WAIT and len(instruction.buckets) == 1:
            if instruction.name in names:
                awaited[instruction.name].append(instruction)
            else:
                base.append(instruction)
        else:
            base.append(instruction)
    last = {b: i for i, s in enumerate(base) if s.op is Op.GRADS and s.kind is Kind.START for b in s.buckets if b in names}
    tokens = [i for i, s in enumerate(base) if s.kind is Kind.START and s.carries_tokens]
    merged = {b: i for i, s in enumerate(base) if s.op is Op.GRADS and s.kind is Kind.WAIT for b in s.buckets}
    measure = next(i for i, s in enumerate(base) if s.name == "measure")
    placed: dict[int, list[Instruction]] = {}
    for name in sorted(names, key=last.__getitem__):
        later = [i for i in tokens if i > last[name]]
        place = later[after - 1] if len(later) >= after else measure - 1
        placed.setdefault(merged.get(name, place), []).extend([*awaited[name], *groups[name]])
    return tuple(s for i, instruction in enumerate(base) for s in (instruction, *placed.get(i, ())))
