"""Schedules for tests: hand-made instructions, settings of all kinds for a strategy, other orders of its list, delays,
layouts."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from random import Random

from megalina.blocks.model import plain_shape
from megalina.layout import axis_of_group, rows
from megalina.perfmodel.sim.lanes import Here, Rule, Sent
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import RanksOf, Seconds
from megalina.step.forward import Shape, plain
from megalina.step.plan import Plan
from megalina.step.program import MOVABLE, BucketSpec, Instruction, Kind, Op, Program, reads_of, writes_of
from megalina.step.strategy import Setting

OF_OTHER_PASSES = ("ddp", "fixed", "lina", "lina_zero", "flow")  # strategies; what the others do is in these
SHAPES = {
    "experts in every layer": plain_shape(moe=(True, True)),
    "dense first, shared experts": plain_shape(moe=(False, True), shared_experts=True),
    "three layers, statistics of all ranks": plain_shape(moe=(True, False, True), global_balance=True, tied=False),
    "tensor parallel, shared experts": plain_shape(moe=(False, True), tp=True, shared_experts=True),
    "tensor parallel, copied activations": plain_shape(moe=(True, False), tp=True, sequence=False, tied=False),
    "experts that choose": plain_shape(moe=(True, False, True), experts_choose=True),
    "selection biases": plain_shape(moe=(True, True), router_state=True),
}
LAYOUTS = ((1, 2, 1), (1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 2, 2))  # edp, ep, tp
WALKING = ("flow", "lina_zero")  # strategies whose parts walk in turn
NAMED = Sizes(lambda instruction: float(instruction.name.split()[1]))  # "b 200" sends 200 bytes
DELAYS_S = (0.0, 0.0, 1e-5, 1e-3, 3e-3, 0.1)  # some devices are much slower than the wire, some not


def compute(name: str, reads: str = "", writes: str = "") -> Instruction:
    """ "a 3" computes for 3 s, where tests say so."""
    return Instruction("F", Kind.COMPUTE, name, reads=tuple(reads.split()), writes=tuple(writes.split()))


def start(name: str, op: Op = Op.TOKENS, axis: str = "ep", reads: str = "", **more: object) -> Instruction:
    """ "a 200" sends 200 bytes with `NAMED`."""
    instruction = Instruction("F", Kind.START, name, reads=tuple(reads.split()), writes=(f"{name}>",), op=op, axis=axis)
    return replace(instruction, **more)


def wait(name: str, op: Op = Op.TOKENS, axis: str = "ep", writes: str = "") -> Instruction:
    return Instruction("F", Kind.WAIT, name, reads=(f"{name}>",), writes=(writes or f"{name}.",), op=op, axis=axis)


def buckets_of(shape: Shape, *, sharded: bool = False, piece: int | None = None) -> dict[str, BucketSpec]:
    names = dict.fromkeys(u for s in plain(shape) for u in s.uses)
    return {name: BucketSpec(64 + 16 * i, axis_of_group(name), sharded, piece) for i, name in enumerate(names)}


def setting_of(name: str, shape: Shape, random: Random) -> Setting:
    """Numbers drawn for every mechanism, whether a strategy uses it or not; pair has several micro-batches."""
    return Setting(
        shape,
        buckets_of(shape, sharded=random.random() < 0.5, piece=random.choice((None, 40))),
        micro_batches=random.choice((2, 3, 4) if name == "pair" else (1, 1, 2, 3)),
        recompute_mode=random.choice(("none", "full")),
        plan=Plan(
            name,
            parts=random.choice((1, 2, 3)) if name in (*WALKING, "pair") else 1,
            chunks=tuple(random.choice((1, 2, 3)) for is_moe in shape.moe if is_moe),
            merge_bytes=random.choice((0, 400, 4000)),
            yields=random.random() < 0.7,
            gap_bytes=random.choice(((), (("experts", 200), ("attention", 360)))),
        ),
    )


def order_of(program: Program, random: Random) -> Program:
    """Another order of the same instructions in which every value is written before it is read."""
    left = Counter(value for instruction in program for value in writes_of(instruction))  # writers that are still to come
    readers: dict[str, list[int]] = {}
    missing = []
    for i, instruction in enumerate(program):
        values = {v for v in reads_of(instruction) if v in left}
        missing.append(len(values))
        for value in values:
            readers.setdefault(value, []).append(i)
    free, out = [i for i, count in enumerate(missing) if count == 0], []
    while free:
        at = random.randrange(len(free))
        free[at], free[-1] = free[-1], free[at]
        instruction = program[free.pop()]
        out.append(instruction)
        for value in writes_of(instruction):
            left[value] -= 1
            for reader in readers.get(value, ()) if left[value] == 0 else ():
                missing[reader] -= 1
                if missing[reader] == 0:
                    free.append(reader)
    assert len(out) == len(program)
    return tuple(out)


@cache
def ranks_of(layout: tuple[int, int, int]) -> RanksOf:
    """Who talks to whom in a layout (edp, ep, tp)."""
    table = rows(dict(zip(("edp", "ep", "tp"), layout, strict=True)))
    found = {(axis, rank): tuple(row) for axis, groups in table.items() for row in groups for rank in row}
    return lambda axis, rank: found[axis, rank]


def delays(random: Random, delays_s: tuple[float, ...] = DELAYS_S) -> Seconds:
    """Of each rank and instruction, drawn once."""
    drawn: dict[tuple[int, int], float] = {}

    def seconds(rank: int, instruction: Instruction) -> float:
        key = rank, id(instruction)  # hashing an instruction takes longer than walking it
        if key not in drawn:
            drawn[key] = random.choice(delays_s)
        return drawn[key]

    return seconds


def random_network(random: Random, groups: Collection[tuple[int, ...]]) -> Network:
    """`groups`: of ranks that will talk; where a node holds more of one than another does, nothing is hierarchical."""
    per_node = random.choice([1, 2, 3])
    even = all(len(set(Counter(rank // per_node for rank in group).values())) == 1 for group in groups)
    hierarchical = ["hierarchical"] if even else []
    return Network(
        nic_bytes_per_s=random.choice([10, 40]),
        ranks_per_node=per_node,
        nics_per_node=random.randint(1, per_node),
        fast_bytes_per_s=random.choice([20, 100]),
        nic_behind_port=random.random() < 0.5,
        nodes_per_group=random.choice([0, 1, 2]),
        oversubscription=random.choice([1, 2, 4]),
        latency_s=random.choice([0, 0.25]),
        hop_s=random.choice([0, 0.125]),
        algorithm=random.choice(["direct", "ring", "tree", *hierarchical]),
        all_to_all=random.choice(["direct", *hierarchical]),
        rings=random.randint(1, per_node),
        share=random.choice(["flow", "collective"]),
        first=random.choice([(), ((Op.TOKENS,),), ((Op.SUM,), (Op.GRADS,))]),
        at_once=random.choice([0, 0, 1, 2]),
    )


def reduced(program: Program, buckets: Mapping[str, BucketSpec]) -> dict[str, list[int]]:
    """How often each element of each bucket is summed."""
    counts = {name: [0] * bucket.numel for name, bucket in buckets.items()}
    for instruction in program:
        if instruction.op is Op.GRADS and instruction.kind is Kind.START:
            for name in instruction.buckets:
                first, stop = instruction.piece if len(instruction.buckets) == 1 else (0, buckets[name].numel)
                for i in range(first, stop):
                    counts[name][i] += 1
    return counts


def _held_literally(instruction: Instruction, here: Here) -> Sent | None:
    if instruction.op in MOVABLE:
        return here.sent((*MOVABLE, Op.TOKENS)) or here.asked((Op.TOKENS,))
    return here.sent(MOVABLE) if instruction.op is Op.TOKENS else None


# Lina's scheduler as the paper has it (sections 4.1 and 6.1): gradients in one queue, of which one leaves when no all-to-all is
# queued or running here; an all-to-all leaves when no gradient is running here.  Each waits for the other.
LITERAL = Rule(lambda instruction: "gradients" if instruction.op in MOVABLE else instruction.axis, _held_literally)
