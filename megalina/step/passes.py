"""Passes: pure functions from program to program.

`micro_batches` and `recompute` see a forward pass; what follows `step` sees the whole step.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from megalina.step.program import BucketSpec, Kind, Op, Program, Stage, backward, gradient

RECOMPUTED = {  # train.recompute -> the stages whose activations are computed again; exchanges never repeat
    "none": (),
    "selective": ("attention", "attention_heads", "experts", "mlp", "mlp_hidden", "shared"),
    "full": (
        *("embed", "positions", "attention", "attention_norm", "attention_heads", "attention_residual"),
        *("mlp", "mlp_norm", "mlp_hidden", "mlp_residual", "slice", "score", "select", "route", "experts", "shared", "mix"),
        *("head_norm", "logits", "loss"),
    ),
}
LOSSES = ("loss", "aux", "global_aux", "z")  # nobody reads them in the forward pass


def rename_part(forward: Program, part: str) -> Program:
    """The same forward pass for another part of the step."""

    def to(value: str) -> str:
        return f"{value.rpartition('.')[0]}.{part}"

    return tuple(replace(s, part=part, reads=tuple(map(to, s.reads)), writes=tuple(map(to, s.writes))) for s in forward)


def recompute(forward: Program, names: Collection[str]) -> Program:
    """Drop the activations of these compute stages after forward."""
    return tuple(replace(s, recompute=True) if s.kind is Kind.COMPUTE and s.name in names else s for s in forward)


def losses_of(forward: Program) -> tuple[str, ...]:
    """The values from which backward starts."""
    return tuple(v for s in forward for v in s.writes if v.split(".")[0] in LOSSES)


def step(forward: Program, micro_batches: int) -> Program:
    """Forward and backward of each micro-batch in turn.

    Gradients are sums: each loss is seeded with one over the step's global number of tokens (`#divisor`), which is
    known before the first backward.  Nothing else is ever divided.
    """
    parts = [rename_part(forward, str(i)) for i in range(micro_batches)]
    batches = tuple(f"#batch.-.{i}" for i in range(micro_batches))
    compute, start, wait = Kind.COMPUTE, Kind.START, Kind.WAIT
    out = [
        Stage("U", compute, "sizes", reads=batches, writes=("#own_divisor.-.0",)),
        Stage("U", start, "divisor", reads=("#own_divisor.-.0",), writes=("#own_divisor>.-.0",), op=Op.SUM, axis="dp"),
    ]
    for i, part in enumerate(parts):
        out += part
        if i == 0:
            out.append(Stage("U", wait, "divisor", reads=("#own_divisor>.-.0",), writes=("#divisor.-.0",), op=Op.SUM, axis="dp"))
        losses = losses_of(part)
        seeds = tuple(map(gradient, losses))
        out.append(Stage("U", compute, "seed", part=str(i), reads=("#divisor.-.0", *losses), writes=seeds))
        out += backward(part)
    return tuple(out)


def place_gradients(program: Program, buckets: Mapping[str, BucketSpec]) -> Program:
    """Eager: a bucket goes on the wire, piece by piece, as soon as its last gradient is there.

    All are awaited at the end, in the order in which they started.
    """
    last = {group: i for i, s in enumerate(program) if s.phase == "B" for group in s.uses}
    out: list[Stage] = []
    waits: list[Stage] = []
    for i, stage in enumerate(program):
        out.append(stage)
        for group in stage.uses:
            if last.get(group) == i:
                starts, awaited = _pieces(group, buckets[group], Op.GRADS)
                out += starts
                waits += awaited
    return tuple(out + waits)


def finish(program: Program, buckets: Mapping[str, BucketSpec]) -> Program:
    """What closes a step: one reduction of norm and statistics, the update of every bucket, ZeRO-1's all-gathers."""
    losses = tuple(v for s in program if s.phase == "F" for v in s.writes if v.split(".")[0] in (*LOSSES, "#load"))
    sums = tuple(f"{gradient(name)}sum" for name in buckets)
    compute, start, wait = Kind.COMPUTE, Kind.START, Kind.WAIT
    out = [
        *program,
        Stage("U", compute, "measure", reads=losses + sums, writes=("#own_measure.-.0",)),
        Stage("U", start, "measured", reads=("#own_measure.-.0",), writes=("#own_measure>.-.0",), op=Op.SUM, axis="world"),
        Stage("U", wait, "measured", reads=("#own_measure>.-.0",), writes=("#measured.-.0",), op=Op.SUM, axis="world"),
        Stage("U", compute, "verdict", reads=("#measured.-.0", "#divisor.-.0"), writes=("#verdict.-.0",)),
    ]
    waits: list[Stage] = []
    for name, bucket in buckets.items():
        out.append(Stage("U", compute, f"update {name}", reads=(f"{gradient(name)}sum", "#verdict.-.0"), writes=(f"new {name}",)))
        if bucket.sharded:
            starts, awaited = _pieces(name, bucket, Op.PARAMS)
            out += starts
            waits += awaited
    return tuple(out + waits)


def _pieces(name: str, bucket: BucketSpec, op: Op) -> tuple[list[Stage], list[Stage]]:
    """STARTs and WAITs of all pieces of a bucket."""
    reads, done = (gradient(name), f"{gradient(name)}sum") if op is Op.GRADS else (f"new {name}", f"whole {name}")
    phase = "B" if op is Op.GRADS else "U"
    starts, waits = [], []
    for cut in cuts(bucket.numel, bucket.piece):
        wire = f"{reads}>{cut[0]}"
        start = Stage(phase, Kind.START, name, reads=(reads,), writes=(wire,), op=op, axis=bucket.axis, piece=cut)
        starts.append(start)
        waits.append(replace(start, kind=Kind.WAIT, reads=(wire,), writes=(done,)))
    return starts, waits


def cuts(numel: int, size: int | None) -> Sequence[tuple[int, int]]:
    """The pieces of a bucket: [start, stop) of each."""
    size = size or numel
    return [(i, min(i + size, numel)) for i in range(0, numel, size)]
