"""A block: one part of a model, declared once and without torch; a loss, as its block declares it.

From the blocks of a model follow the forward program, buckets, parameter counts, FLOPs, times, memory and what is recomputed.
Its torch functions, named as its instructions, are one class, which `functions` points to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from megalina.blocks.dispatch import ALL_ROWS, Dispatch
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import At
from megalina.blocks.work import Piece
from megalina.config import ModelConfig, RouterConfig
from megalina.step.forward import Shape, compute, exchange
from megalina.step.program import Instruction, Op


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar that each part's list writes, is minimized with a weight, and is reported.

    What is minimized is the sum over losses of weight x value / divisor; `U:seed` starts backward with weight / divisor."""

    name: str  # for people and records: "z_loss"
    values: tuple[str, ...]  # what the list calls it: `z.<layer>.<part>`, or `loss.-.<part>`
    weight: float
    divisor: Literal["loss_tokens", "valid_tokens"]  # of the whole step, over all ranks
    layers: int = 1  # it is reported as the mean over so many


@dataclass(frozen=True, slots=True)
class Whole:
    """What blocks know of the model as a whole."""

    model: ModelConfig
    router: RouterConfig
    vocab_size: int  # words
    padded_vocab: int  # rows of the embedding
    max_positions: int
    dispatch: Dispatch = ALL_ROWS  # how tokens reach their experts


class Block:
    """Declare `name`, `functions`, `parameters`, `work` and `memory`; the rest has defaults, those of a block that works on each
    token by itself: one instruction, whose weights every tensor-parallel rank holds whole."""

    name: ClassVar[str]
    functions: ClassVar[str]  # where its torch functions are: "package.module:Class" or "folder/file.py:Class"
    heavy: ClassVar[tuple[str, ...]] = ()  # instructions that train.recompute=selective computes again
    cheap: ClassVar[tuple[str, ...]] = ()  # instructions that are never computed again
    mixes_tokens: ClassVar[bool] = False  # of a block of your own: a token's result depends on others, so no text can be written

    def __init__(self, whole: Whole):
        self.whole, self.model, self.router = whole, whole.model, whole.router
        self._hash = hash((type(self), repr(whole)))

    def __eq__(self, other: object) -> bool:
        """Blocks of one class in models that are alike: then so is all that they declare."""
        return type(other) is type(self) and other.whole == self.whole

    def __hash__(self) -> int:
        return self._hash

    @property
    def emulated(self) -> Sequence[str]:
        """Instructions that nearly all FLOPs are in: an emulated device takes its time for them, and for no others."""
        return self.heavy

    @property
    def deferrable(self) -> Sequence[str]:
        """Instructions whose functions take `later`: the products that give their weights' gradients may be instructions of their
        own; `deferred` says what waits for them."""
        return ()

    @property
    def losses(self) -> Sequence[Loss]:
        """Those that it writes in one layer."""
        return ()

    def parameters(self) -> Sequence[Parameter]:
        """Of one layer, in the order in which they lie in their buckets."""
        return ()

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        """Its forward instructions; `reads` and `writes` are the residual stream before and after it."""
        return [compute(self.name, layer, f"{reads} #batch", writes, *self.groups(shape, layer))]

    def groups(self, shape: Shape, layer: int) -> Sequence[str]:
        """The buckets that its parameters are in."""
        return [p.group(layer, tp=shape.tp, pipeline=shape.pipeline) for p in self.parameters()]

    def work(self, at: At) -> Piece:
        """What one of its compute instructions asks of a device."""
        raise ValueError(
            f"{at.instruction.tag}: block {self.name} doesn't say what this costs; define {type(self).__name__}.work"
        )

    def memory(self, at: At) -> Inside:
        """What one of its compute instructions keeps and needs; in whole tokens."""
        raise ValueError(
            f"{at.instruction.tag}: block {self.name} doesn't say what this keeps; define {type(self).__name__}.memory"
        )

    def deferred(self, at: At) -> Deferred:
        """What waits where the mirror of one of `deferrable` leaves out the products that give weights' gradients."""
        return Deferred()

    def keeps(self, at: At) -> Sequence[str]:
        """Values it writes that the same memory is kept for backward of, too: they are not in `memory(at).kept`."""
        return ()

    def value_bytes(self, at: At) -> Mapping[str, int]:
        """Bytes of the values that its instructions write, by what their names begin with, but those of the residual stream."""
        return {}


def between(
    shape: Shape, layer: int, name: str, inner: str, x: str, n: str, out: str, uses: Sequence[str], also: str = ""
) -> list[Instruction]:
    """Norm, gather, the part of a layer that tp cuts, sum: Megatron's tensor and sequence parallelism.  `uses`: of the part;
    `also`: what it writes besides."""
    whole = f"{n}_all" if shape.sequence else n
    instructions = [compute(f"{name}_norm", layer, x, n, shape.copied(layer))]
    if shape.sequence:
        instructions += exchange(f"{name}_gather", layer, Op.GATHER, "tp", n, whole)
    instructions.append(compute(f"{name}_{inner}", layer, f"{whole} #batch", f"{out}_part{also}", *uses))
    instructions += exchange(f"{name}_sum", layer, Op.SCATTER if shape.sequence else Op.SUM, "tp", f"{out}_part", out)
    return instructions


def norm_parameters(name: str, model: ModelConfig) -> list[Parameter]:
    """RMSNorm or LayerNorm over the model's width."""
    weight = Parameter(f"{name}.weight", (model.d_model,), None)
    return [weight] if model.norm == "rmsnorm" else [weight, Parameter(f"{name}.bias", (model.d_model,), 0.0)]


def output_std(model: ModelConfig) -> float:
    """Of matrices that write to the residual stream."""
    return model.init_std / (2 * model.num_layers) ** 0.5
