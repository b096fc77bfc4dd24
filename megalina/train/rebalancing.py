"""Rebalancing: experts change ranks in the middle of a run, so that ranks have equally many rows.

Every `parallel.rebalance_interval` steps the rows that experts have had since the last time decide where each is from then on.
All ranks know these counts from the steps' results, so they decide alike without a word.  Weights, optimizer moments and master
weights move with all their bits, one layer at a time; a step computes the same in any order of experts, up to rounding.

L MoE layers, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megalina.comm.slice import Slice
from megalina.parallel.reshard import move
from megalina.placement.balanced_order import balanced_order, changed_ranks
from megalina.placement.expert_order import Order
from megalina.train.built import Built

Tensors = Mapping[str, Sequence[Slice]]


@dataclass(frozen=True, slots=True)
class Moved:
    """`before`, `after`: the busiest rank's rows over the mean, of the steps that decided, as experts lay and as they lie; mean
    over MoE layers."""

    experts: int  # that are on another rank, over all layers
    sent_bytes: int  # by this rank
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"{self.experts} experts changed ranks ({self.sent_bytes / 1e6:.1f} MB sent by rank 0): the busiest rank's rows were "
            f"{self.before:.2f} times the mean, and would have been {self.after:.2f} times"
        )


class Rebalancing:
    """`tensors`: this rank's part of the run's state, as views that say where in the whole they are."""

    def __init__(self, built: Built, tensors: Callable[[], Tensors], *, interval: int):
        """`interval`: steps; 0: experts stay where they are."""
        self.interval, self._built, self._tensors = interval, built, tensors
        gpt = built.trainable.gpt
        self._load_LE = torch.zeros(len(gpt.moe_layers), gpt.config.num_experts, dtype=torch.int64)
        self._order_LE: Tensor | None = None  # the expert in each place, as long as none moves

    def count(self, loads: Tensor) -> None:
        """A step's loads, int64 [L, E + 1], the last of them lost choices."""
        if self.interval:
            self._load_LE += loads[:, :-1].cpu()

    def fullest_over_mean(self, loads: Tensor) -> float:
        """The busiest rank's rows over the mean in a step with these loads, int64 [L, E + 1], mean over MoE layers."""
        if self._order_LE is None:
            self._order_LE = _places(self._built.trainable.gpt.expert_orders)
        return self._fullest(loads[:, :-1].cpu(), self._order_LE)

    def due(self, step: int) -> bool:
        """Whether to `rebalance` before this step."""
        return bool(self.interval) and step > 1 and (step - 1) % self.interval == 0

    def rebalance(self) -> Moved:
        """By what was counted since the last time.  All ranks call it between the same two steps."""
        present, ranks, load_LE = self._built.trainable.gpt.expert_orders, self._built.mesh.ep.size, self._load_LE
        self._load_LE = torch.zeros_like(load_LE)
        of_layer = dict(zip(present, load_LE.numpy(), strict=True))
        orders = {layer: balanced_order(of_layer[layer], ranks, order) for layer, order in present.items()}
        before, after = (self._fullest(load_LE, _places(of)) for of in (present, orders))
        moved = sum(changed_ranks(order, orders[layer], ranks) for layer, order in present.items())
        return Moved(moved, self.move_to(orders), before, after)

    def move_to(self, orders: Mapping[int, Order]) -> int:
        """From now on experts lie in these orders, by layer; returns the bytes that this rank has sent.  All ranks together."""
        trainable, mesh, log = self._built.trainable, self._built.mesh, self._built.trainable.log
        present = trainable.gpt.expert_orders
        changed = [layer for layer, order in orders.items() if order != present[layer]]
        if not changed:
            return 0
        log.position.enter("rebalance", False)
        trainable.settle()
        old = self._tensors()
        trainable.gpt.lay_experts(orders)
        self._order_LE = None
        new = self._tensors()
        sent_bytes = 0
        for layer in changed:
            names = [name for name in new if name.rpartition("/")[2].startswith(f"layers.{layer}.experts.")]  # KIND/PARAMETER
            copies = {name: [replace(part, local=part.local.clone()) for part in old[name]] for name in names}
            sent_bytes += move(copies, mesh, {name: new[name] for name in names}, mesh, log)
        log.position.leave()
        return sent_bytes

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        if not self.interval:
            return {}
        orders = self._built.trainable.gpt.expert_orders
        return {"orders": {str(layer): list(order) for layer, order in orders.items()}, "loads": self._load_LE.tolist()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on as the run that saved it: experts move where they were.  All ranks together, with all tensors loaded."""
        if self.interval and state:
            self._load_LE = torch.tensor(state["loads"], dtype=torch.int64)
            self.move_to({int(layer): tuple(order) for layer, order in state["orders"].items()})

    def _fullest(self, load_LE: Tensor, order_LE: Tensor) -> float:
        """1 without MoE layers."""
        if not len(order_LE):
            return 1.0
        rows_LR = load_LE.gather(1, order_LE).unflatten(1, (self._built.mesh.ep.size, -1)).sum(2)
        return (rows_LR.amax(1) / rows_LR.double().mean(1).clamp(min=1.0)).mean().item()


def _places(orders: Mapping[int, Order]) -> Tensor:
    """int64 [L, E]: the expert in each place."""
    return torch.tensor(list(orders.values()), dtype=torch.int64)
