"""The forward pass of one part of a micro-batch, in the order in which a reader expects it."""

from dataclasses import dataclass

from megalina.step.program import Instruction, Kind, Op, Program

C, S, W = Kind.COMPUTE, Kind.START, Kind.WAIT


@dataclass(frozen=True, slots=True)
class Shape:
    """What the list must know of a model and of its layout."""

    moe: tuple[bool, ...]  # per layer: MoE or a dense MLP
    shared_experts: bool = False
    tied: bool = True  # the output head is the embedding
    tp: bool = False  # more than one tensor-parallel rank
    sequence: bool = True  # with tp: activations between attention and MLP are cut along the tokens
    global_balance: bool = False  # the balance loss needs the choices of all ranks
    micro_batch_groups: bool = False  # capacity and balance are of whole micro-batches: parts of one must know of each other
    equal_counts: bool = (
        False  # every MoE layer sends each expert as many rows as the first one: one exchange of counts is enough
    )
    selection_bias: bool = False  # routers have a bias that a step's loads move

    @property
    def num_layers(self) -> int:
        return len(self.moe)

    def dense(self, layer: int) -> str:
        """The parameter group of what tp cuts."""
        return f"dense.{layer}"

    def copied(self, layer: int) -> str:
        """The parameter group of what every tp rank holds whole: norms, router, shared experts."""
        return f"copied.{layer}" if self.tp else f"dense.{layer}"

    @property
    def head(self) -> str:
        return "embedding" if self.tied else "head"

    @property
    def ends(self) -> str:
        """The parameter group of what is copied outside the layers: learned positions, the last norm."""
        return "ends" if self.tp else "embedding"


def plain(shape: Shape) -> Program:
    """Forward of part "0": embedding, layers, loss.  Given: `#batch.-.0` and the parameter groups."""
    out = _embedding(shape)
    for layer, moe in enumerate(shape.moe):
        out += _attention(shape, layer) + (_moe(shape, layer) if moe else _mlp(shape, layer))
    return tuple(out + _loss(shape))


def _names(text: str, layer: int) -> tuple[str, ...]:
    """`x h` -> x.3.0 h.3.0; `x+` is the next layer's; `#batch` has no layer."""

    def name(v: str) -> str:
        if v == "#batch":
            return "#batch.-.0"
        return f"{v[:-1]}.{layer + 1}.0" if v.endswith("+") else f"{v}.{'-' if layer < 0 else layer}.0"

    return tuple(map(name, text.split()))


def _compute(name: str, layer: int, reads: str, writes: str, *uses: str) -> Instruction:
    return Instruction("F", C, name, layer, "0", _names(reads, layer), _names(writes, layer), tuple(dict.fromkeys(uses)))


def _exchange(name: str, layer: int, op: Op, axis: str, value: str, writes: str, also: tuple[str, ...] = ()) -> list[Instruction]:
    """START and WAIT of one value; both read `also` (whole names: sizes)."""
    wire = _names(value + ">", layer)
    start = Instruction("F", S, name, layer, "0", _names(value, layer) + also, wire, op=op, axis=axis)
    wait = Instruction("F", W, name, layer, "0", wire + also, _names(writes, layer), op=op, axis=axis)
    return [start, wait]


def _embedding(shape: Shape) -> list[Instruction]:
    if not shape.tp:
        return [Instruction("F", C, "embed", -1, "0", ("#batch.-.0",), ("x.0.0",), ("embedding",))]
    op = Op.SCATTER if shape.sequence else Op.SUM
    return [
        _compute("embed", -1, "#batch", "e", "embedding"),
        *_exchange("embed_sum", -1, op, "tp", "e", "embedded"),
        Instruction("F", C, "positions", -1, "0", ("embedded.-.0", "#batch.-.0"), ("x.0.0",), (shape.ends,)),
    ]


def _between(shape: Shape, layer: int, name: str, x: str, n: str, out: str, *uses: str) -> list[Instruction]:
    """Norm, gather, the part of a layer that tp cuts, sum: Megatron's tensor and sequence parallelism."""
    whole = f"{n}_all" if shape.sequence else n
    instructions = [_compute(f"{name}_norm", layer, x, n, shape.copied(layer))]
    if shape.sequence:
        instructions += _exchange(f"{name}_gather", layer, Op.GATHER, "tp", n, whole)
    instructions.append(
        _compute(f"{name}_heads" if name == "attention" else f"{name}_hidden", layer, f"{whole} #batch", f"{out}_part", *uses)
    )
    instructions += _exchange(f"{name}_sum", layer, Op.SCATTER if shape.sequence else Op.SUM, "tp", f"{out}_part", out)
    return instructions


def _attention(shape: Shape, layer: int) -> list[Instruction]:
    if not shape.tp:
        return [_compute("attention", layer, "x #batch", "h", shape.dense(layer))]
    return [
        *_between(shape, layer, "attention", "x", "n", "a", shape.dense(layer), shape.copied(layer)),
        _compute("attention_residual", layer, "x a #batch", "h", shape.copied(layer)),
    ]


def _mlp(shape: Shape, layer: int) -> list[Instruction]:
    if not shape.tp:
        return [_compute("mlp", layer, "h #batch", "x+", shape.dense(layer))]
    return [
        *_between(shape, layer, "mlp", "h", "m", "o", shape.dense(layer)),
        _compute("mlp_residual", layer, "h o #batch", "x+", shape.copied(layer)),
    ]


def _moe(shape: Shape, layer: int) -> list[Instruction]:
    """Router, dispatch, experts, combine.  With tp each rank routes its own 1/tp of the tokens."""
    copied = shape.copied(layer)
    slices = shape.tp and not shape.sequence  # activations are copied over tp: cut here, gather at the end
    h = "own" if slices else "h"
    routed = f"rows weight {'prob' if shape.global_balance else 'aux'} z #order #load"
    normed = "moe_n " if shape.shared_experts else ""
    out = [_compute("slice", layer, "h", "own")] if slices else []
    if shape.tp:  # decisions about a group of tokens need the scores of all of them
        out += [
            _compute("score", layer, h, "moe_n score #score", copied),
            *_exchange("scores", layer, Op.GATHER, "tp", "#score", "#scores"),
            _compute("select", layer, "moe_n score #scores #batch", routed),
        ]
    else:
        out.append(_compute("route", layer, f"{h} #batch", normed + routed, copied))
    shared = [_compute("shared", layer, "moe_n", "s", copied)] if shape.shared_experts else []
    counted = shape.moe.index(True) if shape.equal_counts else layer
    counts = _exchange("counts", layer, Op.COUNTS, "counts", "#order", "#sizes") if counted == layer else []
    sizes = _names("#sizes", counted)
    dispatch = _exchange("dispatch", layer, Op.TOKENS, "ep", "rows", "got", sizes)
    combine = _exchange("combine", layer, Op.TOKENS, "ep", "y", "back", sizes)
    experts = Instruction("F", C, "experts", layer, "0", _names("got", layer) + sizes, _names("y", layer), (f"experts.{layer}",))
    result = "mixed" if slices else "x+"
    out += [
        *counts,
        dispatch[0],
        *shared,  # under the dispatch
        dispatch[1],
        experts,
        *combine,
        _compute("mix", layer, f"{h} back weight {'s ' if shared else ''}#order #batch", result),
    ]
    if slices:
        out += _exchange("mix_gather", layer, Op.GATHER, "tp", "mixed", "x+")
    return out


def _loss(shape: Shape) -> list[Instruction]:
    last = f"x.{shape.num_layers}.0"
    balance: list[Instruction] = []
    if shape.global_balance:
        layers = [i for i, moe in enumerate(shape.moe) if moe]
        loads, probs = (tuple(f"{v}.{i}.0" for i in layers) for v in ("#load", "prob"))
        balance = [
            Instruction("F", C, "loads", -1, "0", loads, ("#loads.-.0",)),
            *_exchange("all_loads", -1, Op.SUM, "world", "#loads", "#all_loads"),
            Instruction("F", C, "balance", -1, "0", (*probs, "#all_loads.-.0"), ("global_aux.-.0",)),
        ]
    if not shape.tp:
        uses = tuple(dict.fromkeys((shape.head, shape.ends)))
        return balance + [Instruction("F", C, "loss", -1, "0", (last, "#batch.-.0"), ("loss.-.0",), uses)]
    whole = "n_all" if shape.sequence else "n"
    gather = _exchange("head_gather", -1, Op.GATHER, "tp", "n", whole) if shape.sequence else []
    return balance + [
        Instruction("F", C, "head_norm", -1, "0", (last,), ("n.-.0",), (shape.ends,)),
        *gather,
        _compute("logits", -1, f"{whole} #batch", "stat", shape.head),  # log-sum-exp and target logit of this rank's vocabulary
        *_exchange("stat_gather", -1, Op.GATHER, "tp", "stat", "stats"),
        _compute("loss", -1, "stats #batch", "loss"),
    ]
