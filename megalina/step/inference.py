"""The list of an inference step: a forward pass in which experts may sit in many places (Lina, section 5).

Before a MoE layer's rows travel, each rank tells the others how many rows it has for each expert.  What earlier layers chose
says what the next layer will choose, so this rides along, and the next layer is planned and its experts are fetched while the
rows of this one are on the wire.  All ranks hear the same, plan the same and learn the same: nobody has to be told.
"""

from megalina.step.forward import Shape
from megalina.step.program import Kind, Op, Program, Stage, check


def inference_step(shape: Shape, *, learns: bool) -> Program:
    """The checked program: prefill or decode of this rank's sequences; leaves `#out.-.0`, the last norm's output.

    Given: `#batch.-.0`.  With `learns` a predictor learns at the end from what was heard.  ValueError with tensor
    parallelism: ranks are devices of experts here.
    """
    if shape.tp:
        raise ValueError("inference has no tensor parallelism: its ranks share out experts and sequences; leave parallel.tp at 1")
    moe = [layer for layer, is_moe in enumerate(shape.moe) if is_moe]
    following = dict(zip(moe, moe[1:], strict=False))
    out = [_compute("embed", -1, ("#batch.-.0",), ("x.0.0",))]
    if moe:
        out.append(_compute("foresee", moe[0], ("#batch.-.0",), (f"#plan.{moe[0]}.0",)))
    for layer, is_moe in enumerate(shape.moe):
        out.append(_compute("attention", layer, (f"x.{layer}.0", "#batch.-.0"), (f"h.{layer}.0",)))
        if is_moe:
            out += _moe(layer, following.get(layer), shared=shape.shared_experts)
        else:
            out.append(_compute("mlp", layer, (f"h.{layer}.0", "#batch.-.0"), (f"x.{layer + 1}.0",)))
    out.append(_compute("final", -1, (f"x.{shape.num_layers}.0",), ("#out.-.0",)))
    if learns and moe:
        out.append(_compute("learn", -1, tuple(f"#heard.{layer}.0" for layer in moe), ("#learned.-.0",)))
    program = tuple(out)
    check(program, {"#batch.-.0"}, {})
    return program


def _moe(layer: int, following: int | None, *, shared: bool) -> list[Stage]:
    """`following`: the next MoE layer."""

    def v(*names: str) -> tuple[str, ...]:
        return tuple("#batch.-.0" if name == "#batch" else f"{name}.{layer}.0" for name in names)

    dispatch = _exchange("dispatch", layer, Op.TOKENS, "ep", f"rows.{layer}.0", f"got.{layer}.0", v("#sizes"))
    combine = _exchange("combine", layer, Op.TOKENS, "ep", f"y.{layer}.0", f"back.{layer}.0", v("#sizes"))
    foresee = [_compute("foresee", following, v("#heard"), (f"#plan.{following}.0",))] if following is not None else []
    return [
        _compute("score", layer, v("h", "#batch"), v("moe_n", "weight", "#chosen", "#told")),
        *_exchange("told", layer, Op.GATHER, "counts", f"#told.{layer}.0", f"#heard.{layer}.0"),
        _compute("assign", layer, v("moe_n", "#chosen", "#heard", "#plan"), v("rows", "#order", "#sizes")),
        dispatch[0],
        *foresee,  # under the dispatch, as are the shared experts
        *([_compute("shared", layer, v("moe_n"), v("s"))] if shared else []),
        dispatch[1],
        _compute("experts", layer, v("got", "#sizes"), v("y")),
        *combine,
        _compute("mix", layer, v("h", "back", "weight", *(["s"] if shared else []), "#order", "#batch"), (f"x.{layer + 1}.0",)),
    ]


def _compute(name: str, layer: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Stage:
    return Stage("F", Kind.COMPUTE, name, layer, "0", reads, writes)


def _exchange(name: str, layer: int, op: Op, axis: str, value: str, writes: str, also: tuple[str, ...] = ()) -> list[Stage]:
    head, rest = value.split(".", 1)
    wire = (f"{head}>.{rest}",)
    start = Stage("F", Kind.START, name, layer, "0", (value, *also), wire, op=op, axis=axis)
    wait = Stage("F", Kind.WAIT, name, layer, "0", (*wire, *also), (writes,), op=op, axis=axis)
    return [start, wait]
