"""The programs of all pipeline ranks as the program of one process: what they compute, in an order in which ranks could, without
what they send one another."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megalina.step.passes import finish, place_gradients
from megalina.step.pipeline.fill import ends_of
from megalina.step.program import MOVABLE, BucketSpec, Instruction, Kind, Op, Program


def on_one_process(of_ranks: Sequence[Program], buckets: Mapping[str, BucketSpec], *, router_state: bool) -> Program:
    """Seeds of a micro-batch become one, before the first of them; norm and update are of all buckets."""
    out: list[Instruction] = []
    opened: set[tuple] = set()
    seeds: dict[str, list[Instruction]] = defaultdict(list)
    for program in of_ranks:
        for instruction in program:
            if instruction.name == "seed":
                seeds[instruction.part].append(instruction)
    for instruction in _in_one_order(of_ranks):
        if ends_of(instruction.axis) or instruction.op in MOVABLE:
            continue
        if instruction.phase == "B" and (own := seeds.pop(instruction.part, [])):
            reads, writes = dict.fromkeys(v for seed in own for v in seed.reads), [v for seed in own for v in seed.writes]
            out.append(replace(own[0], reads=tuple(reads), writes=tuple(writes)))
        if instruction.phase == "U":
            same = instruction.tag, instruction.kind
            if instruction.name not in ("sizes", "divisor") or same in opened:
                continue
            opened.add(same)
        out.append(instruction)
    return finish(place_gradients(tuple(out), buckets), buckets, router_state=router_state)


def _in_one_order(of_ranks: Sequence[Program]) -> list[Instruction]:
    """Round and round, each rank as far as it comes until something has to arrive."""
    at, out = [0] * len(of_ranks), list[Instruction]()
    sent: set[tuple] = set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(of_ranks):
            while at[rank] < len(program):
                instruction = program[at[rank]]
                message = instruction.phase, instruction.key
                if instruction.kind is Kind.START and instruction.op is Op.SEND:
                    sent.add(message)
                if instruction.kind is Kind.WAIT and instruction.op is Op.RECV and message not in sent:
                    break
                out.append(instruction)
                at[rank] += 1
                moved = True
    assert at == list(map(len, of_ranks))
    return out
