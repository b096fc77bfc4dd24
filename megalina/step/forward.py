"""The forward pass of one part of a micro-batch, block by block, in the order in which a reader expects it.

Blocks write its lines, instructions of part "0", by short names of their values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from megalina.step.program import Instruction, Kind, Op, Program


def names(text: str, layer: int) -> tuple[str, ...]:
    """`x h` -> x.3.0 h.3.0; `x+` is the next layer's; `#batch` has no layer.  What has a dot is a name already."""

    def name(v: str) -> str:
        if v == "#batch":
            return "#batch.-.0"
        if "." in v:
            return v
        return f"{v[:-1]}.{layer + 1}.0" if v.endswith("+") else f"{v}.{'-' if layer < 0 else layer}.0"

    return tuple(map(name, text.split()))


def compute(name: str, layer: int, reads: str, writes: str, *uses: str) -> Instruction:
    """`uses`: parameter groups."""
    groups = tuple(dict.fromkeys(uses))
    return Instruction("F", Kind.COMPUTE, name, layer, "0", names(reads, layer), names(writes, layer), groups)


def exchange(name: str, layer: int, op: Op, axis: str, value: str, writes: str, also: tuple[str, ...] = ()) -> list[Instruction]:
    """START and WAIT of one value; both read `also` (whole names: sizes)."""
    (sent,) = names(value, layer)
    head, rest = sent.split(".", 1)
    wire = (f"{head}>.{rest}",)
    start = Instruction("F", Kind.START, name, layer, "0", (sent, *also), wire, op=op, axis=axis)
    wait = Instruction("F", Kind.WAIT, name, layer, "0", (*wire, *also), names(writes, layer), op=op, axis=axis)
    return [start, wait]


class Lines(Protocol):
    """What the list must know of a block; `megalina/blocks` declares them."""

    @property
    def name(self) -> str: ...

    @property
    def heavy(self) -> tuple[str, ...]:
        """Compute instructions that `train.recompute=selective` computes again."""
        ...

    @property
    def cheap(self) -> tuple[str, ...]:
        """Compute instructions that no `train.recompute` computes again: they keep next to nothing."""
        ...

    @property
    def deferrable(self) -> Sequence[str]:
        """Compute instructions whose backward can leave out the products that give weights' gradients."""
        ...

    def lines(self, shape: "Shape", layer: int, reads: str, writes: str) -> list[Instruction]:
        """Its forward instructions in this layer (-1: outside of the layers), from the stream's value to its next."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What the list must know of a model and of its layout."""

    first: Lines  # the embedding
    layers: tuple[tuple[Lines, ...], ...]  # each layer's blocks, those of multi-token prediction last
    last: tuple[Lines, ...]  # head and losses: each reads the last layer's output
    moe: tuple[bool, ...]  # per layer: MoE or a dense MLP
    mtp_layers: int = 0  # so many of `layers` are of multi-token prediction
    mtp_head: Lines | None = None  # reads what each of them gives
    tp: bool = False  # more than one tensor-parallel rank
    sequence: bool = True  # with tp: activations between attention and MLP are cut along the tokens
    context: str = ""  # each sequence is cut over cp: all_gather or all_to_all, of `parallel.cp_kind`; "": it is not
    shared_experts: bool = False
    micro_batch_groups: bool = False  # capacity and balance are of whole micro-batches: parts of one must know of each other
    whole_routers: bool = False  # a router must see the whole micro-batch at once
    router_state: bool = False  # routers have state that a step's loads move: a selection bias, a capacity
    pipeline: bool = False  # layers, and what is outside of them, are on several pipeline ranks
    head_logits: bool = False  # attention tells the largest logit of each group of heads: an update goes by it

    @property
    def num_layers(self) -> int:
        """Those whose output the head reads; layers of multi-token prediction come after them."""
        return len(self.layers) - self.mtp_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, is_moe in enumerate(self.moe) if is_moe)

    @property
    def sharers(self) -> str:
        """The axis of the ranks that share out the tokens of a micro-batch; "": each has all of its own."""
        return "cp_tp" if self.context else "tp" if self.tp else ""

    def dense(self, layer: int) -> str:
        """The parameter group of what tp cuts."""
        return f"dense.{layer}"

    def copied(self, layer: int) -> str:
        """The parameter group of what every tp rank holds whole: norms, router, shared experts."""
        return f"copied.{layer}" if self.tp else f"dense.{layer}"

    def groups(self, layer: int) -> tuple[str, ...]:
        """All parameter groups that a layer may have."""
        return self.dense(layer), self.copied(layer), f"experts.{layer}"

    @property
    def ends(self) -> str:
        """The parameter group of what is copied outside the layers: the last norm, and learned positions, but in a pipeline."""
        return "ends" if self.tp or self.pipeline else "embedding"

    @property
    def positions(self) -> str:
        """The parameter group of learned positions, which a pipeline has where the last norm isn't."""
        return "positions" if self.pipeline else self.ends

    @property
    def without_mtp(self) -> "Shape":
        """What is left of it where nothing is trained."""
        number = self.num_layers
        return replace(self, layers=self.layers[:number], moe=self.moe[:number], mtp_layers=0, mtp_head=None)

    def placed(self) -> Iterator[tuple[int, Lines, str, str]]:
        """Each block with its layer and the stream's values before and after it: x, h (then h1, h2, ... where a layer has more
        than two blocks), the next layer's x; "" where there is none."""
        yield -1, self.first, "", "x.0.0"
        for layer, blocks in enumerate(self.layers):
            between = ["h", *(f"h{i}" for i in range(1, len(blocks) - 1))][: len(blocks) - 1]
            for block, (reads, writes) in zip(blocks, pairwise(["x", *between, "x+"]), strict=True):
                yield layer, block, reads, writes
            if self.mtp_head is not None and layer >= self.num_layers:
                yield layer, self.mtp_head, "x+", ""
        for block in self.last:
            yield -1, block, f"x.{self.num_layers}.0", ""

    def deferred(self, mode: str) -> frozenset[str]:
        """The compute instructions whose weights' gradients are instructions of their own under
        `strategy.deferred_weights=mode`."""
        if mode == "none":
            return frozenset()
        names = {name for _, block, _, _ in self.placed() for name in block.deferrable}
        return frozenset(names if mode == "all" else names & {"experts"})

    def recomputed(self, mode: str, forward: Program) -> frozenset[str]:
        """The compute instructions of `forward` whose activations `train.recompute=mode` computes again in backward; exchanges
        never repeat."""
        if mode == "none":
            return frozenset()
        blocks = [block for _, block, _, _ in self.placed()]
        if mode == "selective":
            return frozenset(name for block in blocks for name in block.heavy)
        cheap = {name for block in blocks for name in block.cheap}
        return frozenset(s.name for s in forward if s.kind is Kind.COMPUTE) - cheap


def plain(shape: Shape) -> Program:
    """Forward of part "0": embedding, layers, loss.  Given: `#batch.-.0` and the parameter groups."""
    return tuple(i for layer, block, reads, writes in shape.placed() for i in block.lines(shape, layer, reads, writes))
