"""The list of an inference step: a forward pass in which experts may sit in many places (Lina, section 5).

Before a MoE layer's rows travel, each rank tells the others how many rows it has for each expert.  What earlier layers chose
says what the next layer will choose, so this rides along, and the next layer is planned and its experts are fetched while the
rows of this one are on the wire.  All ranks hear the same, plan the same and learn the same: nobody has to be told.

Lina's packed experts all compute before the second all-to-all starts (section 6.2).  With chunks rows go back as soon as their
slots have computed, so the wire works while the next slots compute.
"""

from dataclasses import replace

from megalina.step.forward import Shape, names
from megalina.step.program import Instruction, Kind, Op, Program, check

BATCH = "#batch.-.0"  # of this rank
PAST = "#past.-.0"  # its earlier keys and values, of each layer; None: there are none, and none are kept
REROUTE = "#reroute.-.0"  # what is done instead of what routers choose, or None


def given_of(shape: Shape) -> set[str]:
    """The values that exist before the step."""
    return {BATCH, PAST, REROUTE} if any(shape.moe) else {BATCH, PAST}


def inference_step(shape: Shape, *, learns: bool, chunks: int = 1, once: bool = False) -> Program:
    """The checked program: prefill or decode of this rank's sequences; leaves `#out.-.0`, the last norm's output.

    Given: `given_of(shape)`.  With `learns` a predictor learns at the end from what was heard.  A device's slots in a layer are
    cut into `chunks` groups, and each group's rows go back by themselves.  `once`: a token goes once to each device that has
    experts of it, which first hears how many come.  ValueError with tensor or context parallelism: ranks are devices of experts
    here; and for less than one chunk.

    Of MoE layer i, besides rows: `#plan.i` is what is expected and where experts should sit, `#seen.i` what tokens chose in the
    MoE layers up to i, `#told.i` what a rank tells of its tokens and `#heard.i` what all told, `#evidence.i` which part of that
    is to be learned from, `#outcome.i` what became of the expectation.  Left behind, too: the last `#seen`, each `#outcome`.
    """
    if chunks < 1:
        raise ValueError(f"{chunks} chunks of slots: choose 1 or more")
    if shape.tp:
        raise ValueError("inference has no tensor parallelism: its ranks share out experts and sequences; leave parallel.tp at 1")
    if shape.context:
        raise ValueError("inference has no context parallelism: each rank has whole sequences; leave parallel.cp at 1")
    shape = shape.without_mtp
    moe = [layer for layer, is_moe in enumerate(shape.moe) if is_moe]
    before, following = dict(zip(moe[1:], moe, strict=False)), dict(zip(moe, moe[1:], strict=False))
    out = [_compute("embed", -1, (BATCH,), ("x.0.0",))]
    if moe:
        out.append(_foresee(moe[0], BATCH))
    for layer, block, *stream in shape.placed():
        if layer < 0:
            continue
        (reads,), (writes,) = (names(value, layer) for value in stream)
        match block.name:
            case "attention":
                out.append(_compute("attention", layer, (reads, BATCH, PAST), (writes,)))
            case "mlp":
                out.append(_compute("mlp", layer, (reads, BATCH), (writes,)))
            case "moe":
                near = before.get(layer), following.get(layer)
                out += _moe(layer, *near, reads, writes, shared=shape.shared_experts, chunks=chunks, once=once)
            case _:  # of your own: as in training
                out += [replace(line, uses=()) for line in block.lines(shape, layer, *stream)]
    out.append(_compute("final", -1, (f"x.{shape.num_layers}.0",), ("#out.-.0",)))
    if learns and moe:
        heard = (f"#{name}.{layer}.0" for layer in moe for name in ("heard", "evidence", "plan"))
        out.append(_compute("learn", -1, tuple(heard), ("#learned.-.0",)))
    program = tuple(out)
    check(program, given_of(shape), {})
    return program


def _moe(
    layer: int, before: int | None, following: int | None, h: str, x: str, *, shared: bool, chunks: int, once: bool
) -> list[Instruction]:
    """`before`, `following`: the MoE layers next to it; `h`, `x`: the stream before and after it."""

    def v(*names: str) -> tuple[str, ...]:
        return tuple(BATCH if name == "#batch" else f"{name}.{layer}.0" for name in names)

    arrive, sizes = ("packed_got", "#way_sizes") if once else ("got", "#sizes")
    dispatch = _exchange("dispatch", layer, Op.TOKENS, "ep", f"rows.{layer}.0", f"{arrive}.{layer}.0", v(sizes))
    counts = _exchange("counts", layer, Op.COUNTS, "counts", f"#way.{layer}.0", f"#way_sizes.{layer}.0") if once else []
    way = ("#way",) if once else ()
    foresee = [_foresee(following, *v("#heard", "#evidence"))] if following is not None else []
    seen = (f"#seen.{before}.0",) if before is not None else ()
    score_writes = v("moe_n", "weight", "#chosen", "#seen", "#told", "#evidence")
    return [
        _compute("score", layer, (h, *v("#batch"), REROUTE, *v("#plan"), *seen), score_writes),
        *_exchange("told", layer, Op.GATHER, "counts", f"#told.{layer}.0", f"#heard.{layer}.0"),
        _compute("assign", layer, v("moe_n", "#chosen", "#heard", "#plan"), v("rows", *way, "#order", "#sizes", "#outcome")),
        *counts,
        dispatch[0],
        *foresee,  # under the dispatch, as are the shared experts
        *([_compute("shared", layer, v("moe_n"), v("s"))] if shared else []),
        dispatch[1],
        *([_compute("unpack", layer, v(arrive, sizes, "#sizes"), v("got"))] if once else []),
        *_experts(layer, chunks),
        _compute("mix", layer, (h, *v("back", "weight", *(["s"] if shared else []), "#order", "#batch")), (x,)),
    ]


def _experts(layer: int, chunks: int) -> list[Instruction]:
    """Slots, and the way back of their rows, chunk by chunk.

    Chunks on the wire have no credit, unlike training's: all are awaited together, so it is no loss if they end together."""
    got, sizes, back = f"got.{layer}.0", f"#sizes.{layer}.0", f"back.{layer}.0"
    parts = ["0"] if chunks == 1 else [f"0c{c}" for c in range(chunks)]
    out: list[Instruction] = []
    waits: list[Instruction] = []
    for c, part in enumerate(parts):
        y = f"y.{layer}.{part}"
        start, wait = _exchange("combine", layer, Op.TOKENS, "ep", y, f"back.{layer}.{part}", (sizes,))
        instructions = [_compute("experts", layer, (got, sizes), (y,)), start, wait]
        *first, last = (replace(s, part=part, chunk=(c, chunks)) for s in instructions)
        out += first
        waits.append(last)
    if chunks == 1:
        return out + waits
    arrived = tuple(f"back.{layer}.{part}" for part in parts)
    join = _compute("join", layer, (*arrived, sizes), (back,))
    return [*out, *waits, replace(join, chunk=(0, chunks))]


def _foresee(layer: int, *reads: str) -> Instruction:
    return _compute("foresee", layer, reads, (f"#plan.{layer}.0",))


def _compute(name: str, layer: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Instruction:
    return Instruction("F", Kind.COMPUTE, name, layer, "0", reads, writes)


def _exchange(name: str, layer: int, op: Op, axis: str, value: str, writes: str, also: tuple[str, ...] = ()) -> list[Instruction]:
    head, rest = value.split(".", 1)
    wire = (f"{head}>.{rest}",)
    start = Instruction("F", Kind.START, name, layer, "0", (value, *also), wire, op=op, axis=axis)
    wait = Instruction("F", Kind.WAIT, name, layer, "0", (*wire, *also), (writes,), op=op, axis=axis)
    return [start, wait]
