"""The torch functions of a block: methods named as its instructions, bound to one layer's parameters.

A function takes the values that its instruction reads, in order, and returns those that it writes, in order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import proxy

from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.block import Block
from megalina.model.init import parameter
from megalina.model.late_gradients import Later
from megalina.model.permute import RowOrder
from megalina.model.tokens import TokenShare
from megalina.step.program import Instruction


@dataclass(slots=True)
class Seen:
    """What a forward pass on one device leaves beside its result."""

    routed: list["Routed"] = field(default_factory=list)  # of each MoE layer


@dataclass(frozen=True, slots=True)
class Routed:
    """What the router of a MoE layer did."""

    logits_TE: Tensor
    weight_TK: Tensor
    losses: tuple[Tensor, ...]  # in the order of the block's `losses`
    order: RowOrder | None  # None: all experts computed all tokens where they lay
    load: Tensor  # int64 [E + 1]: tokens that chose each expert, choices lost to capacity; then cosines, see MoE.selected


class BlockFunctions:
    """`holder` gets the block's declared parameters, at their names."""

    def __init__(self, block: Block, holder: Any):
        self.block = block
        self.holder: Any = proxy(holder)  # which has these functions: a circle of references would keep its memory
        for declared in block.parameters():
            hang(holder, declared.name, parameter(declared))

    @property
    def share(self) -> TokenShare:
        share: TokenShare = self.holder.share
        return share

    def weight(self, name: str) -> Tensor:
        """A parameter by its declared name."""
        where, _, last = name.rpartition(".")
        found: Tensor = getattr(self.holder.get_submodule(where), last)
        return found

    def bind(self, instruction: Instruction, later: Later | None) -> Callable[..., Any]:
        """The function of an instruction.  `later`: where its backward puts what adds the gradients of weights, which it leaves
        out; None: it adds them itself."""
        function: Callable[..., Any] = getattr(self, instruction.name)
        return function if later is None else partial(function, later=later)

    def forward(self, x_TD: Tensor, batch: Batch, seen: Seen, past: Any = None) -> Tensor:
        """The whole block on one device.  `past`: the layer's keys and values, in generation."""
        out: Tensor = getattr(self, self.block.name)(x_TD, batch)
        return out


def hang(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Register a parameter at a dotted name; modules that are missing on the way are made."""
    *path, last = name.split(".")
    for step in path:
        if getattr(module, step, None) is None:
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    assert module._parameters.get(last) is None, f"{name} is declared twice"
    module.register_parameter(last, value)


def no_parameters(module: nn.Module, *names: str) -> None:
    """Places for parameters that a block may declare, in this order."""
    for name in names:
        module.register_parameter(name, None)
