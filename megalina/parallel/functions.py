"""The functions of compute instructions: those of the model's blocks, and those that open and close a step.

A function takes the values that its instruction reads, in order, and returns those that it writes, in order.  A step's measure,
float64, is summed over the world: sums of losses, squares of gradients, wishes to stop, the riders of the log of collectives,
each MoE layer's load.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.collective_log import NUM_RIDERS, agree
from megalina.mesh import Mesh
from megalina.model.digest import LIMBS, tokens_digest
from megalina.model.experts import Later
from megalina.model.gpt import GPT
from megalina.model.routers import GroupSoFar
from megalina.parallel.buckets import Bucket
from megalina.step.program import Instruction


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks know at the end of a step, before anything is updated.  Losses are means a token."""

    loss: float  # nats, without auxiliary terms
    auxiliary: Mapping[
        str, float
    ]  # by the name of the loss: mean over MoE layers, unweighted; balance_loss is 1 at perfect balance
    grad_norm: float  # over all parameters, before clipping
    grad_scale: float  # what the update multiplies gradients by
    finite: bool  # False: the step is skipped, on all ranks alike
    spike: bool  # the guard refuses this loss: the step is skipped, on all ranks alike
    loss_tokens: int
    valid_tokens: int
    stop: bool  # some rank was asked to stop after this step
    loads: Tensor  # int64 [MoE layers, E + 1]: tokens that chose each expert, choices lost to capacity
    tokens_digest: int  # 64 bits, of the step's global batch; 0 without ledger
    routing_digests: tuple[int, ...]  # 64 bits a MoE layer, of the step's routing decisions; 0 without ledger

    @property
    def balance_loss(self) -> float:
        return self.auxiliary.get("balance_loss", 0.0)

    @property
    def z_loss(self) -> float:
        return self.auxiliary.get("z_loss", 0.0)

    @property
    def updates(self) -> bool:
        """Whether the step changes the weights."""
        return self.finite and not self.spike


class CollectivesDiffer(RuntimeError):
    """The ranks have not submitted the same collectives in this step; nothing was updated."""


class StageFunctions:
    """`functions(instruction)` for the executor.

    `update(name, verdict)` updates a bucket.  `wish_to_stop()` is asked once a step on each rank; one wish is enough,
    and all ranks learn of it in the same step.  `is_spike(loss)` must answer alike on all ranks.  `explain()`, asked where
    the ranks' collectives differ, says how.
    """

    def __init__(
        self,
        gpt: GPT,
        mesh: Mesh,
        buckets: dict[str, Bucket],
        *,
        clip_norm: float,
        update: Callable[[str, Verdict], None],
        wish_to_stop: Callable[[], bool],
        is_spike: Callable[[float], bool],
        explain: Callable[[], str],
        ledger: bool,
    ):
        self.is_spike, self.explain, self.ledger = is_spike, explain, ledger
        self._late: dict[tuple[str, int, str], Later] = {}  # of instructions whose weights are late: what adds their gradients
        self.non_finite: list[str] = []  # parameters of the last step whose gradients are not finite
        self.gpt, self.mesh, self.buckets, self.clip_norm, self.update = gpt, mesh, buckets, clip_norm, update
        self.wish_to_stop = wish_to_stop
        self.losses = gpt.blocks.losses
        self._loss_of = {value: loss.name for loss in self.losses for value in loss.values}

    def __call__(self, instruction: Instruction) -> Callable[..., Any]:
        if instruction.name.startswith("update "):
            return partial(self._update, instruction.name.removeprefix("update "))
        if instruction.phase == "W":
            return partial(self._add_late, instruction.key)
        if instruction.phase == "U":
            named = getattr(self, f"_{instruction.name}")
            values = [v.split(".")[0] for v in instruction.reads]
            return partial(named, values) if instruction.name in ("seed", "measure") else named
        later = self._late.setdefault(instruction.key, []) if instruction.late else None
        return self.gpt.functions_of(instruction).bind(instruction, later)

    def _add_late(self, key: tuple[str, int, str]) -> None:
        """What backward of this instruction left out."""
        late = self._late[key]
        for add in late:
            add()
        late.clear()

    # without autograd
    def _sizes(self, *batches: Batch) -> Tensor:
        loss_tokens = torch.stack([b.loss_mask_BS.sum() for b in batches]).sum()
        valid_tokens = torch.stack([b.valid_BS.sum() for b in batches]).sum()
        digest = torch.stack([tokens_digest(b) if self.ledger else loss_tokens.new_zeros(LIMBS) for b in batches]).sum(0)
        return torch.cat([torch.stack([loss_tokens, valid_tokens]), digest]).double()

    def _sizes_of_group(self, *batches: Batch) -> GroupSoFar:
        """Of a micro-batch, before the first of its parts is routed in any layer."""
        tokens = torch.stack([b.valid_BS.sum() for b in batches]).sum()
        return GroupSoFar(tokens, tokens.new_zeros(self.gpt.config.num_experts))

    def _seed(self, names: list[str], divisor: Tensor, *losses: Tensor) -> tuple[Tensor, ...]:
        """The gradient of what is minimized with respect to each loss."""
        per_loss, per_valid = (1.0 / divisor[:2].clamp(min=1)).unbind()
        per = {"loss_tokens": per_loss, "valid_tokens": per_valid}
        weights = {loss.name: loss.weight * per[loss.divisor] for loss in self.losses}
        return tuple(weights[self._loss_of[n]].to(v.dtype) for n, v in zip(names[1:], losses, strict=True))

    def _measure(self, names: list[str], *values: Any) -> Tensor:
        """float64: sums of losses and squares over this rank, and its loads."""
        zero = torch.zeros((), dtype=torch.float64, device=self.gpt.embedding.device)
        sums = {loss.name: zero for loss in self.losses}
        loads = [value for name, value in zip(names, values, strict=True) if name == "#load"]
        for name, value in zip(names, values, strict=True):
            if (loss := self._loss_of.get(name)) is not None:
                sums[loss] = sums[loss] + value.double()
        squares = torch.stack([b.square_sum() for b in self.buckets.values()]).sum()
        layers = len(self.gpt.moe_layers)
        load = torch.stack(loads).view(-1, layers, loads[0].numel()).sum(0).double().flatten() if layers else squares.new_zeros(0)
        own = squares.new_tensor([float(self.wish_to_stop()), *self.mesh.log.riders()])
        return torch.cat([torch.stack([*sums.values(), squares]), own, load])

    def _verdict(self, measured: Tensor, divisor: Tensor) -> Verdict:
        loss_tokens, valid_tokens, *batch_digest = (int(v) for v in divisor.tolist())
        count = len(self.losses)
        head = count + 2 + NUM_RIDERS
        numbers = measured[:head].tolist()
        sums, squares, wishes, riders = numbers[:count], numbers[count], numbers[count + 1], numbers[count + 2 :]
        if not agree(riders, self.mesh.world.size):
            raise CollectivesDiffer(self.explain())
        norm = squares**0.5
        scale = min(1.0, self.clip_norm / (norm + 1e-6)) if self.clip_norm > 0 else 1.0
        per = {"loss_tokens": max(loss_tokens, 1), "valid_tokens": max(valid_tokens, 1)}
        means = {of.name: total / per[of.divisor] / of.layers for of, total in zip(self.losses, sums, strict=True)}
        mean_loss = means.pop("loss")
        loads = measured[head:].long().view(len(self.gpt.moe_layers), self.gpt.config.num_experts + 1 + LIMBS).cpu()
        finite = all(map(math.isfinite, (*sums, norm)))
        return Verdict(
            loss=mean_loss,
            auxiliary=means,
            grad_norm=norm,
            grad_scale=scale,
            finite=finite,
            spike=finite and self.is_spike(mean_loss),
            loss_tokens=loss_tokens,
            valid_tokens=valid_tokens,
            stop=wishes > 0,
            loads=loads[:, :-LIMBS],
            tokens_digest=_joined(batch_digest),
            routing_digests=tuple(map(_joined, loads[:, -LIMBS:].tolist())),
        )

    def _update(self, name: str, gradient: Tensor, verdict: Verdict) -> None:
        if not verdict.finite:  # the optimizer is about to clear the gradients
            bucket = self.buckets[name]
            self.non_finite += [m.name for m in bucket.members if not bucket.grad[m.start : m.stop].isfinite().all()]
        self.update(name, verdict)

    def _evaluated(self, loss: Tensor, batch: Batch) -> Tensor:
        """[2]: this rank's sum of losses, and its share of the number of tokens they are of."""
        return torch.stack([loss.double(), batch.loss_mask_BS.sum().double() / self.mesh.tp.size])


def _joined(limbs: list[int]) -> int:
    """A 64-bit digest of sums of its limbs."""
    return (limbs[0] & 0xFFFFFFFF) | (limbs[1] & 0xFFFFFFFF) << 32
