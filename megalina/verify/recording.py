"""A recording: everything a few training steps compute, in order, whole, so that two ways to run them can be laid side by side.

S sequences of the global batch, L tokens each, D width, E experts, K choices of a token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.model import Blocks
from megalina.blocks.moe import MoE
from megalina.blocks.routers import kind_of
from megalina.config import ModelConfig, PretrainConfig, RouterConfig
from megalina.model.permute import RowOrder

SEQUENCES = 8  # of the global batch
INITIAL = -1  # the step of the weights before the first step
AUXILIARY = ("balance_loss", "z_loss")  # those that every router has
NOBODY = -1  # in an integer `by_rank`: the rank does not hold this


NODES = 2  # of a layout whose gradients are summed by node


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to run the work on ranks: world = pp x edp x ep x cp x tp, tp innermost."""

    world: int = 1
    tp: int = 1
    ep: int = 1
    sequence: bool = True
    zero: int = 0
    micro_batch: int = 2  # sequences a forward pass on one data-parallel rank
    recompute: str = "none"
    piece_mb: float = 0.0
    strategy: str = "eager"
    cp: int = 1
    cp_kind: str = "all_gather"
    pp: int = 1
    chunks: int = 1  # stages on each of pp ranks
    pipeline: str = "1f1b"
    stages: str = ""  # which layers are in each
    dispatch: str = "rows"
    reduce: str = "flat"  # by_node: as if the ranks were on NODES nodes

    @property
    def dp(self) -> int:
        """Ranks over which dense gradients are summed, those of cp among them."""
        return self.world // (self.tp * self.pp)

    @property
    def readers(self) -> int:
        """Ways in which sequences are shared out."""
        return self.dp // self.cp

    @property
    def edp(self) -> int:
        return self.world // (self.tp * self.ep * self.cp * self.pp)

    @property
    def copies(self) -> int:
        """Ranks that hold the same experts: edp x cp x tp."""
        return self.world // (self.ep * self.pp)

    @property
    def micro_batches(self) -> int:
        return SEQUENCES // (self.micro_batch * self.readers)

    def sequences(self, rank: int) -> list[range]:
        """The sequences of the global batch in each of a rank's micro-batches."""
        own = SEQUENCES // self.readers
        first = rank % (self.world // self.pp) // (self.tp * self.cp) * own
        return [range(i, i + self.micro_batch) for i in range(first, first + own, self.micro_batch)]

    def __str__(self) -> str:
        """For tables: `4 ranks: tp 2 ep 2 edp 1, zero 1, 2 x 2 sequences, recompute full`."""
        text = f"{self.world} rank{'s' * (self.world > 1)}: tp {self.tp} ep {self.ep} edp {self.edp}"
        text += f", cp {self.cp} by {self.cp_kind}" * (self.cp > 1)
        text += f", pp {self.pp} {self.pipeline} x {self.chunks}{f' {self.stages}' if self.stages else ''}" * (self.pp > 1)
        text += ", no sequence" * (self.tp > 1 and not self.sequence)
        text += f", {self.dispatch}" * (self.dispatch != "rows")
        text += f", reduced {self.reduce}" * (self.reduce != "flat")
        text += f", zero {self.zero}, {self.micro_batches} x {self.micro_batch} sequences"
        text += f", recompute {self.recompute}" * (self.recompute != "none")
        return text + f", pieces {self.piece_mb:g} MiB" * (self.piece_mb > 0)


@dataclass(slots=True)
class Entry:
    """One tensor of a step, as one process has it."""

    step: int  # 0, 1, ...; INITIAL for the weights before the first
    kind: str  # routing | activation | loss | gradient | norm | weight
    name: str
    value: Tensor  # float64; int64 for routing
    by_rank: list[Tensor] | None = None  # of more than one rank: what each has, in the whole's shape; NaN or NOBODY elsewhere
    note: str = ""  # for people: where it comes from, such as the instruction's tag


@dataclass(slots=True)
class Recording:
    """Entries in the order of computation."""

    layout: Layout | None  # None: one process that knows no program, mesh or bucket
    config: PretrainConfig  # what ran
    batches: list[Batch]  # the global batch of each step
    entries: list[Entry]
    # Of the reference alone, filled by `reference.detail`: parameter -> [units, losses, *shape].  A unit is a micro-batch of the
    # layout in question; losses as `terms_of` has them, as weighted in what is minimized.  They sum to the first
    # step's gradient.
    unit_gradients: dict[str, Tensor] = field(default_factory=dict)
    _places: dict[tuple[int, str, str], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._places = {(e.step, e.kind, e.name): i for i, e in enumerate(self.entries)}
        assert len(self._places) == len(self.entries), "two entries of one name"

    def entry(self, step: int, kind: str, name: str) -> Entry:
        """KeyError where there is none."""
        return self.entries[self._places[step, kind, name]]


def terms_of(blocks: Blocks) -> list[str]:
    """The losses of `Recording.unit_gradients`, in their order."""
    return ["loss", *AUXILIARY, *(loss.name for loss in blocks.losses if loss.name not in ("loss", *AUXILIARY))]


def order_of(blocks: Blocks, parameters: list[str]) -> list[tuple[str, str]]:
    """(kind, name) of the entries of a step, in the order of computation.  `parameters`: as the model lists them."""
    out = [("activation", "embedded")]
    for i, of_layer in enumerate(blocks.layers):
        for block in of_layer:
            if isinstance(block, MoE):
                chosen = [] if block.kind.is_dense else [("routing", f"layers.{i}.expert")]
                out += [("activation", f"layers.{i}.logits"), *chosen, ("activation", f"layers.{i}.weight")]
            out.append(("activation", stream_name(blocks, i, block.name)))
    out += [("loss", name) for name in (*(loss.name for loss in blocks.losses), "loss_tokens", "valid_tokens")]
    out += [("routing", f"layers.{i}.load") for i, is_moe in enumerate(blocks.moe) if is_moe]
    out += [("gradient", name) for name in reversed(parameters)]
    out += [("norm", "grad_norm"), ("norm", "grad_scale")]
    if blocks.whole.router.bias_update_rate:
        out += [("routing", bias_name(i)) for i, is_moe in enumerate(blocks.moe) if is_moe]
    return out + [("weight", name) for name in parameters]


def bias_name(layer: int) -> str:
    """Of what a step leaves of a layer's selection bias, see `bits_of`."""
    return f"layers.{layer}.selection_bias"


def bits_of(bias_E: Tensor) -> Tensor:
    """int64 [E]: the bits of float32 numbers, which must be the same in every layout."""
    return bias_E.view(torch.int32).long()


def stream_name(blocks: Blocks, layer: int, block: str) -> str:
    """What the residual stream is called after a block of a layer: that of the last one is the layer's."""
    return f"layers.{layer}" if blocks.layers[layer][-1].name == block else f"layers.{layer}.{block}"


def choices_of(order: RowOrder, columns: int) -> Tensor:
    """[T, columns] int64: the expert of each choice of a token as rows are really sent; the number of experts means nobody.

    `columns` is at least the order's own; more of them say nobody.
    """
    num_experts = len(order.count_E)
    flat = torch.full((order.row_TK.numel(),), num_experts, dtype=torch.int64, device=order.row_TK.device)
    flat[order.slot_N] = order.experts.repeat_interleave(order.count_E)
    return widened(flat.view(order.row_TK.shape), columns, num_experts)


def widened(value_TK: Tensor, columns: int, fill: float) -> Tensor:
    """[T, columns]: expert choice has as many columns as the busiest token of a micro-batch needs."""
    missing = columns - value_TK.shape[1]
    return torch.nn.functional.pad(value_TK, (0, missing), value=fill) if missing else value_TK


def columns_of(model: ModelConfig, router: RouterConfig) -> int:
    """K of recorded routings."""
    kind = kind_of(router)
    return model.num_experts if kind.experts_choose or kind.is_dense else router.top_k
