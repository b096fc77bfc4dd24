"""Passes: pure functions from program to program.

`recompute` and `chunk` see the forward pass of one part; what follows `step` sees the whole step.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

from megalina.step.program import (
    VERDICT,
    BucketSpec,
    Instruction,
    Kind,
    Op,
    Program,
    backward,
    direction_of,
    gradient,
    has_gradient,
    joined_weights,
    weights_of,
)
from megalina.step.turns import interleave, segments, there_and_back
from megalina.step.whole_matrices import gathered_momentum, orthogonal

GAPS = {  # an exchange of tokens of the backward pass -> the gap of the wire after it
    "combine": "experts",  # between the two all-to-alls of a layer
    "dispatch": "attention",  # under what comes before the next layer's
}


MOVED = ("dispatch", "weights", "experts", "combine")  # instructions of a MoE layer that chunks have each for itself


def rename_part(forward: Program, part: str, share: float = 1.0) -> Program:
    """The same forward pass for another part of the step, which is `share` of a micro-batch."""

    def to(value: str) -> str:
        head, _, old = value.rpartition(".")
        return f"{head}.{part}{old[1:]}"  # "0c1", chunk 1 of part 0

    return tuple(
        replace(s, part=part + s.part[1:], reads=tuple(map(to, s.reads)), writes=tuple(map(to, s.writes)), share=s.share * share)
        for s in forward
    )


def recompute(forward: Program, names: Collection[str]) -> Program:
    """Drop the activations of these compute instructions after forward."""
    return tuple(replace(s, recompute=True) if s.kind is Kind.COMPUTE and s.name in names else s for s in forward)


def defer_weights(forward: Program, names: Collection[str], layers: Collection[int] | None = None) -> Program:
    """Weight gradients later (Lancet, section 4): backward of these instructions, in these layers or in all, gives only what is
    waited for.  The products that give their weights' gradients are instructions of their own, which come after all of backward
    until a pass moves them."""
    return tuple(
        replace(s, late=True) if s.name in names and s.uses and (layers is None or s.layer in layers) else s for s in forward
    )


def losses_of(part: Program, forward: Program) -> tuple[str, ...]:
    """The values of a part from which backward starts: those with a gradient that no instruction of `forward` reads, which is
    this part and those that are taken together with it."""
    read = {v for s in forward for v in s.reads}
    return tuple(v for s in part if s.kind is Kind.COMPUTE for v in s.writes if has_gradient(v) and v not in read)


def decides(instruction: Instruction) -> bool:
    """Whether it decides which experts get a token."""
    return any(v.startswith("#order.") for v in instruction.writes)


def chunk(forward: Program, chunks_of: Mapping[int, int]) -> Program:
    """Pipelining (Lina, section 4.2): a MoE layer's rows travel in chunks, and one chunk's experts compute while another is
    on the wire.  `chunks_of`: layer -> number of chunks; layers that are not in it stay whole.

    Rows are cut after routing, each expert's in equal shares (each rank's, where a token travels once to each rank), so every
    router decides as before, and one exchange of counts tells all chunks' sizes.  Where all experts get all tokens, tokens are
    cut.
    """
    out: list[Instruction] = []
    for instruction in forward:
        n = chunks_of.get(instruction.layer, 1)
        if n == 1 or instruction.name not in (*MOVED, "counts", "shared"):
            out.append(instruction)
        elif instruction.name == "counts":
            # while the counts are on the wire
            out += [instruction, _cut(forward, instruction.layer, n)] if instruction.kind is Kind.START else [instruction]
        elif instruction.name == "dispatch" and instruction.kind is Kind.START:
            layer = [s for s in forward if s.layer == instruction.layer]
            if not any(s.name == "counts" for s in layer):
                out.append(_cut(forward, instruction.layer, n))
            turns = zip_longest(*(segments(_chunk_of(s, c, n) for s in layer if s.name in MOVED) for c in range(n)), fillvalue=[])
            for i, turn in enumerate(turns):
                out += [s for segment in turn for s in segment]
                out += [s for s in layer if s.name == "shared" and i == 0]  # under the first dispatch
            back = f"back.{instruction.layer}.0"
            reads = (*(f"{back}c{c}" for c in range(n)), *_orders(layer))
            out.append(Instruction("F", Kind.COMPUTE, "join", instruction.layer, reads=reads, writes=(back,), chunk=(0, n)))
    return tuple(out)


def _cut(forward: Program, layer: int, n: int) -> Instruction:
    """What travels in a layer, into n chunks: rows; where all experts get all tokens their weights, too."""
    of_layer = [s for s in forward if s.layer == layer]
    moved = [s for s in of_layer if s.name in MOVED]
    arrived = {v for s in moved for v in s.writes}
    whole = dict.fromkeys(v for s in moved for v in s.reads if has_gradient(v) and v not in arrived)
    writes = tuple(f"{v}c{c}" for v in whole for c in range(n))
    return Instruction("F", Kind.COMPUTE, "cut", layer, reads=(*whole, *_orders(of_layer)), writes=writes, chunk=(0, n))


def _orders(of_layer: Sequence[Instruction]) -> tuple[str, ...]:
    """Of what travels: that which is counted; where a layer counts nothing the router's."""
    if counted := next((s.reads for s in of_layer if s.op is Op.COUNTS and s.kind is Kind.START), ()):
        return counted
    return tuple(v for s in of_layer if decides(s) for v in s.writes if v.startswith("#order."))


def _chunk_of(instruction: Instruction, c: int, n: int) -> Instruction:
    def to(value: str) -> str:
        return value if value[0] == "#" else f"{value}c{c}"

    reads, writes = tuple(map(to, instruction.reads)), tuple(map(to, instruction.writes))
    credit = 1 if instruction.carries_tokens else 0
    return replace(instruction, part=f"{instruction.part}c{c}", chunk=(c, n), credit=credit, reads=reads, writes=writes)


def share_group(parts: Sequence[Program], layer: int = -1) -> list[Program]:
    """Parts of one micro-batch, in the order of its tokens, whose routers' group is the whole of it.  `layer`: the first one of
    several, where they are not of the whole pass.

    A part's routing in a layer reads what the part before it left (`#group`: the places taken in the experts' queues) and
    leaves the same for the next, so tokens are kept and dropped as in the whole (capacity passing; Lancet, section 2.3).  The
    balance loss is a product of two sums over the group, so parts give theirs (`prob`, `#group`) and the last one ends with
    the loss of all.
    """
    first, last = parts[0][0].part, parts[-1][0].part
    of_layer = "-" if layer < 0 else str(layer)
    whole = f"#group.{of_layer}.{first.partition('p')[0]}"
    latest = {instruction.layer: whole for instruction in parts[0] if decides(instruction)}
    if not latest:
        return list(parts)

    def linked(instruction: Instruction) -> Instruction:
        if not decides(instruction):
            return instruction
        before = latest[instruction.layer]
        latest[instruction.layer] = f"#group.{instruction.layer}.{instruction.part}"
        writes = tuple(f"prob{v.removeprefix('aux')}" if v.startswith("aux.") else v for v in instruction.writes)
        return replace(instruction, reads=(*instruction.reads, before), writes=(*writes, latest[instruction.layer]))

    out = [tuple(map(linked, part)) for part in parts]
    batches = tuple(f"#batch.-.{part[0].part}" for part in parts)
    probs = tuple(v for part in out for s in part for v in s.writes if v.startswith("prob."))
    sizes = Instruction("U", Kind.COMPUTE, "sizes_of_group", layer, first, batches, (whole,))
    reads, writes = (*probs, *latest.values()), (f"aux.{of_layer}.{last}",)
    balance = Instruction("F", Kind.COMPUTE, "balance_of_group", layer, last, reads, writes)
    out[0], out[-1] = (sizes, *out[0]), (*out[-1], balance)
    return out


def step(
    forward: Program,
    parts: int,
    *,
    together: int = 1,
    share: float = 1.0,
    one_group: bool = False,
    join_weights: bool = False,
    turns_round: bool = False,
    arranged: Callable[[Program], Program] = lambda backward: backward,
) -> Program:
    """Forward and backward of all parts, `together` of them at a time.

    A part is a micro-batch, or `share` of one.  `one_group`: those taken together are one group of the routers.  `join_weights`:
    what backward leaves out is one product for all parts taken together.  `turns_round`: each part by itself
    (`megalina.step.turns.there_and_back`), where there are three or more that need nothing of one another; else backward of all
    follows forward of all.  `arranged`: puts the mirrors of a forward pass into another order.  Gradients are sums: each loss is
    seeded with one over the step's global number of tokens (`#divisor`), which is known before the first backward.  Nothing else
    is ever divided.
    """
    batches = tuple(f"#batch.-.{i}" for i in range(parts))
    compute, start, wait = Kind.COMPUTE, Kind.START, Kind.WAIT
    out = [
        Instruction("U", compute, "sizes", reads=batches, writes=("#own_divisor.-.0",)),
        Instruction("U", start, "divisor", reads=("#own_divisor.-.0",), writes=("#own_divisor>.-.0",), op=Op.SUM, axis="dp"),
    ]
    divisor = Instruction("U", wait, "divisor", reads=("#own_divisor>.-.0",), writes=("#divisor.-.0",), op=Op.SUM, axis="dp")
    for first in range(0, parts, together):
        group = [rename_part(forward, str(i), share) for i in range(first, first + together)]
        if one_group:
            group = share_group(group)
        both = interleave(group)
        seeds = list[Program]()
        for i, part in enumerate(group, first):
            losses = losses_of(part, both)
            writes = tuple(map(gradient, losses))
            seeds.append((Instruction("U", compute, "seed", part=str(i), reads=("#divisor.-.0", *losses), writes=writes),))
        if first == 0:
            seeds[0] = (divisor, *seeds[0])
        if turns_round and together > 2 and not one_group:
            out += there_and_back(group, seeds)
        else:
            out += (*both, *(s for seed in seeds for s in seed), *arranged(backward(both)))
        weights = tuple(weights_of(s) for s in reversed(both) if s.late)
        out += joined_weights(weights) if join_weights else weights
    return tuple(out)


def place_gradients(
    program: Program,
    buckets: Mapping[str, BucketSpec],
    *,
    merge: int = 0,
    merge_first: int = 0,
    place: str = "ready",
    yields: bool = False,
    gaps: Mapping[str, int] | None = None,
) -> Program:
    """Put gradients on the wire, bucket by bucket in the order in which backward is done with them.

    `merge`: neighbours of an axis are sent as one collective once they have so many elements together, the first ones
    once they have `merge_first` (whole, as DDP's buckets; those that ZeRO-1 shards are never merged); 0: each bucket in
    pieces, as its spec says.  `place`: "ready", as soon as the last
    gradient is there; "pair", one between the two all-to-alls of a layer's backward (Lina's fixed schedule); "tail",
    after backward; "gap", at most `gaps[gap]` elements in each gap (see `gap_after`), the rest in the tail.
    `yields`: tokens go first, and one piece is under way at a time.  All are awaited at the end, in the order of starts.
    """
    last = {group: i for i, s in enumerate(program) if s.phase in "BW" for group in s.uses}
    out: list[Instruction] = []
    starts: list[Instruction] = []
    queue: list[Instruction] = []
    held: dict[str, list[str]] = {}  # axis -> buckets that wait for more of it
    limits: dict[str, int] = {}  # axis -> how many elements are enough, once the first have been sent

    def close(axis: str) -> None:
        names = held.pop(axis)
        queue.append(_start("+".join(names), (0, sum(buckets[b].numel for b in names)), Op.GRADS, axis))
        limits[axis] = merge

    def send(elements: float) -> None:
        while queue and elements > 0:
            instruction = queue.pop(0)
            elements -= instruction.piece[1] - instruction.piece[0]
            starts.append(replace(instruction, yields_to=(Op.TOKENS,), credit=1) if yields else instruction)
            out.append(starts[-1])

    for i, instruction in enumerate(program):
        out.append(instruction)
        for group in instruction.uses:
            if last.get(group) != i:
                continue
            spec = buckets[group]
            if merge and not spec.sharded:
                names = held.setdefault(spec.axis, [])
                names.append(group)
                if sum(buckets[b].numel for b in names) >= limits.get(spec.axis, merge_first or merge):
                    close(spec.axis)
            else:
                queue += [_start(group, cut, Op.GRADS, spec.axis) for cut in cuts(spec.numel, spec.piece)]
        if place == "ready":
            send(float("inf"))
        elif place == "pair" and gap_after(instruction) == "experts":
            send(1)
        elif place == "gap" and gaps is not None and (gap := gap_after(instruction)):
            send(gaps.get(gap, 0))
    for axis in list(held):
        close(axis)
    send(float("inf"))
    return tuple(out + list(map(_awaited, starts)))


def gap_after(instruction: Instruction) -> str:
    """The gap in which the wire is free once this has arrived, one of `GAPS`; "": none."""
    arrives = instruction.phase == "B" and instruction.kind is Kind.WAIT and instruction.carries_tokens
    return GAPS.get(instruction.name, "") if arrives else ""


ROUTER_STATE = "router_state"  # selection biases, and what capacity follows: state, as a bucket's parameters are


def finish(
    program: Program, buckets: Mapping[str, BucketSpec], *, router_state: bool = False, params_ahead: bool = False
) -> Program:
    """What closes a step: one reduction of norm and statistics, the update of every bucket, ZeRO-1's all-gathers.

    Matrices that are updated as wholes get their directions before; the largest logits of heads, where attention tells them, are
    sent once the last is there.  `router_state`: of the `Shape`; it follows the loads that the reduction brought.
    `params_ahead`: the all-gathers come first thing in the step instead, each awaited by the first instruction that uses it."""
    seeded = {v for s in program if s.phase == "U" and s.name == "seed" for v in s.reads}
    values = (v for s in program if s.phase == "F" for v in s.writes if v in seeded or v.startswith("#load."))
    losses = tuple(sorted(values, key=lambda v: int(v.rpartition(".")[2].partition("p")[0])))  # part by part
    sums = tuple(f"{gradient(name)}sum" for name in buckets)
    compute, start, wait = Kind.COMPUTE, Kind.START, Kind.WAIT
    told, logits = _logits_sent(program)
    arrived = [value for wait in logits for value in wait.writes]
    out = [
        *(place_params(told, buckets) if params_ahead else told),
        Instruction("U", compute, "measure", reads=losses + sums, writes=("#own_measure.-.0",)),
        Instruction("U", start, "measured", reads=("#own_measure.-.0",), writes=("#own_measure>.-.0",), op=Op.SUM, axis="world"),
        Instruction("U", wait, "measured", reads=("#own_measure>.-.0",), writes=("#measured.-.0",), op=Op.SUM, axis="world"),
        *logits,
        Instruction("U", compute, "verdict", reads=("#measured.-.0", "#divisor.-.0", *arrived), writes=(VERDICT,)),
    ]
    if router_state:
        out.append(Instruction("U", compute, ROUTER_STATE, reads=(VERDICT, ROUTER_STATE), writes=(f"new {ROUTER_STATE}",)))
    waits: list[Instruction] = []
    gathered = [gathered_momentum(name) for name, bucket in buckets.items() if bucket.is_gathered]
    out += [s for momentum in gathered[:1] for s in momentum[:2]]
    for name, bucket in buckets.items():
        if bucket.is_gathered:
            (*_, arrival), *gathered = gathered
            out += [s for momentum in gathered[:1] for s in momentum[:2]]  # travels while these are made orthogonal
            out.append(arrival)
        if bucket.matrices:
            out.append(orthogonal(name, bucket))
        direction = (direction_of(name),) if bucket.matrices else ()
        reads = (f"{gradient(name)}sum", VERDICT, *direction)
        out.append(Instruction("U", compute, f"update {name}", reads=reads, writes=(f"new {name}",)))
        if bucket.sharded and not params_ahead:
            starts = [_start(name, cut, Op.PARAMS, bucket.axis) for cut in cuts(bucket.numel, bucket.piece)]
            out += starts
            waits += map(_awaited, starts)
    return tuple(out + waits)


def _logits_sent(program: Program) -> tuple[Program, Program]:
    """The program with a START for the largest logit of each group of heads, behind the last forward instruction that tells
    some; and the WAIT.  Nothing where attention tells none."""
    places = [i for i, s in enumerate(program) if s.phase == "F" and any(v.startswith("#logit.") for v in s.writes)]
    if not places:
        return program, ()
    logits = tuple(v for i in places for v in program[i].writes if v.startswith("#logit."))
    own, wire = "#own_logits.-.0", "#own_logits>.-.0"
    found = Instruction("U", Kind.COMPUTE, "head_logits", reads=logits, writes=(own,))
    start = Instruction("U", Kind.START, "head_logits", reads=(own,), writes=(wire,), op=Op.MAX, axis="world")
    wait = replace(start, kind=Kind.WAIT, reads=(wire,), writes=("#logits.-.0",))
    return (*program[: places[-1] + 1], found, start, *program[places[-1] + 1 :]), (wait,)


def place_params(program: Program, buckets: Mapping[str, BucketSpec]) -> Program:
    """ZeRO-1's all-gathers under the forward pass: all start first thing, in the order of use, and yield to tokens; a bucket
    is awaited by the first instruction that uses it.  So what one step updated is gathered in the next."""
    order = [u for u in dict.fromkeys(u for s in program for u in s.uses) if buckets[u].sharded]
    starts = {
        name: [
            replace(
                _start(name, cut, Op.PARAMS, buckets[name].axis),
                phase="F",
                reads=(shard_of(name),),
                yields_to=(Op.TOKENS,),
                credit=1,
            )
            for cut in cuts(buckets[name].numel, buckets[name].piece)
        ]
        for name in order
    }
    out = [s for name in order for s in starts[name]]
    for instruction in program:
        for name in instruction.uses:
            out += [replace(_awaited(s), writes=(name,)) for s in starts.pop(name, ())]
        out.append(instruction)
    return tuple(out)


def shard_of(bucket: str) -> str:
    """The value that stands for this rank's part of a bucket's parameters, where the rest has yet to be gathered."""
    return f"shard {bucket}"


def _start(name: str, piece: tuple[int, int], op: Op, axis: str) -> Instruction:
    """The START of a piece of a bucket, or of several buckets at once."""
    reads = tuple(gradient(b) if op is Op.GRADS else f"new {b}" for b in name.split("+"))
    phase = "B" if op is Op.GRADS else "U"
    return Instruction(phase, Kind.START, name, reads=reads, writes=(f"{reads[0]}>{piece[0]}",), op=op, axis=axis, piece=piece)


def _awaited(start: Instruction) -> Instruction:
    done = tuple(f"{gradient(b)}sum" if start.op is Op.GRADS else f"whole {b}" for b in start.buckets)
    return replace(start, kind=Kind.WAIT, reads=start.writes, writes=done, yields_to=(), credit=0)


def cuts(numel: int, size: int | None) -> Sequence[tuple[int, int]]:
    """The pieces of a bucket: [start, stop) of each."""
    size = size or numel
    return [(i, min(i + size, numel)) for i in range(0, numel, size)]
