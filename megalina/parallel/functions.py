"""The functions of compute instructions: those of the model's blocks, and those that open and close a step.

A function takes the values that its instruction reads, in order, and returns those that it writes, in order.  A step's measure,
float64, is summed over the world: sums of losses, squares of gradients, wishes to stop, the riders of the log of collectives,
bytes of tokens, each MoE layer's load.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.sizes import LIMBS
from megalina.collective_log import NUM_RIDERS, CollectiveLog, agree
from megalina.mesh import Mesh
from megalina.model.digest import tokens_digest
from megalina.model.gpt import GPT
from megalina.model.late_gradients import Later, joined
from megalina.model.routers import GroupSoFar
from megalina.parallel.buckets import Bucket
from megalina.parallel.step_result import CollectivesDiffer, Directions, StepResult, Update
from megalina.parallel.token_bytes import TokenBytes
from megalina.step.program import Instruction, parts_of


class InstructionFunctions:
    """`functions(instruction)` for the executor.

    `wish_to_stop()` is asked once a step on each rank; one wish is enough, and all ranks learn of it in the same step.
    `is_spike(loss)` must answer alike on all ranks.  `explain()`, asked where the ranks' collectives in `log` differ, says how.
    """

    update: Update  # of the step that runs: set by the caller ...
    directions: Directions | None = None  # ... and this
    loss_factors: Mapping[str, float]  # of that step, too: of losses' weights, by name, 1 where nothing is said

    def __init__(
        self,
        gpt: GPT,
        mesh: Mesh,
        buckets: dict[str, Bucket],
        *,
        clip_norm: float,
        log: CollectiveLog,
        wish_to_stop: Callable[[], bool],
        is_spike: Callable[[float], bool],
        explain: Callable[[], str],
        ledger: bool,
        token_bytes: TokenBytes,
    ):
        self.token_bytes = token_bytes
        self.log, self.is_spike, self.explain, self.ledger = log, is_spike, explain, ledger
        self.late: dict[tuple[str, int, str], Later] = {}  # of instructions whose weights are late: what adds their gradients
        self.gpt, self.mesh, self.buckets, self.clip_norm = gpt, mesh, buckets, clip_norm
        self.wish_to_stop = wish_to_stop
        self.losses = gpt.blocks.losses
        self._loss_of = {value: loss.name for loss in self.losses for value in loss.values}

    def __call__(self, instruction: Instruction) -> Callable[..., Any]:
        if instruction.name.startswith("update "):
            return partial(self._update, instruction.name.removeprefix("update "))
        if instruction.phase == "U" and instruction.name.startswith(("momentum ", "newton_schulz ")):
            what, _, bucket = instruction.name.partition(" ")
            return partial(getattr(self, f"_{what}"), bucket, instruction.reads)
        if instruction.phase == "W":
            return partial(self._add_late, [(instruction.name, instruction.layer, part) for part in parts_of(instruction)])
        if instruction.phase == "U":
            named = getattr(self, f"_{instruction.name}")
            return partial(named, instruction.reads) if instruction.name in ("seed", "measure", "head_logits") else named
        later = self.late.setdefault(instruction.key, []) if instruction.late else None
        return self.gpt.functions_of(instruction).bind(instruction, later)

    def _add_late(self, keys: Sequence[tuple[str, int, str]]) -> None:
        """What backward of these instructions left out, which are parts of one: product by product, as rows of several parts are
        copied for each."""
        products = list(zip(*(self.late[key] for key in keys), strict=True))
        for key in keys:
            self.late[key].clear()
        for _ in range(len(products)):
            joined(products.pop(0))()

    # without autograd
    def _sizes(self, *batches: Batch) -> Tensor:
        loss_tokens = torch.stack([b.loss_mask_BS.sum() for b in batches]).sum()
        valid_tokens = torch.stack([b.valid_BS.sum() for b in batches]).sum()
        digest = torch.stack([tokens_digest(b) if self.ledger else loss_tokens.new_zeros(LIMBS) for b in batches]).sum(0)
        return torch.cat([torch.stack([loss_tokens, valid_tokens]), digest]).double()

    def _sizes_of_group(self, *batches: Batch) -> GroupSoFar:
        """Of a micro-batch, before the first of its parts is routed in any layer."""
        tokens = torch.stack([b.uncut.valid_BS.sum() for b in batches]).sum()
        return GroupSoFar(tokens, tokens.new_zeros(self.gpt.config.num_experts))

    def _seed(self, names: Sequence[str], divisor: Tensor, *losses: Tensor) -> tuple[Tensor, ...]:
        """The gradient of what is minimized with respect to each loss."""
        per_loss, per_valid = (1.0 / divisor[:2].clamp(min=1)).unbind()
        per = {"loss_tokens": per_loss, "valid_tokens": per_valid}
        weights = {of.name: of.weight * self.loss_factors.get(of.name, 1.0) * per[of.divisor] for of in self.losses}
        return tuple(weights[self._loss_of[_head(n)]].to(v.dtype) for n, v in zip(names[1:], losses, strict=True))

    def _measure(self, names: Sequence[str], *values: Any) -> Tensor:
        """float64: sums of losses and squares over this rank, and its loads."""
        zero = torch.zeros((), dtype=torch.float64, device=self.gpt.device)
        sums = {loss.name: zero for loss in self.losses}
        loads: dict[int, list[Tensor]] = {layer: [] for layer in self.gpt.moe_layers}
        for name, value in zip(names, values, strict=True):
            if _head(name) == "#load":
                loads[int(name.split(".")[1])].append(value)
            if (loss := self._loss_of.get(_head(name))) is not None:
                sums[loss] = sums[loss] + value.double()
        squares = torch.stack([b.square_sum() for b in self.buckets.values()]).sum()
        width = self.gpt.load_width
        of_layers = [torch.stack(parts).sum(0) if parts else zero.new_zeros(width) for parts in loads.values()]
        load = torch.cat(of_layers).double() if of_layers else squares.new_zeros(0)
        own = squares.new_tensor([float(self.wish_to_stop()), *self.log.riders(), *self.token_bytes.take()])
        return torch.cat([torch.stack([*sums.values(), squares]), own, load])

    def _head_logits(self, names: Sequence[str], *logits_G: Tensor) -> Tensor:
        """float64 [layers, groups of heads of all tp ranks]: the largest of all parts, -inf of heads that are elsewhere."""
        tp, here, groups = self.mesh.tp, len(logits_G[0]), self.gpt.blocks.clipped_groups
        out_LG = logits_G[0].new_full((len(self.gpt.blocks.layers), groups), float("-inf"), dtype=torch.float64)
        for name, logit_G in zip(names, logits_G, strict=True):
            own_G = out_LG[int(name.split(".")[1]), tp.rank * here : (tp.rank + 1) * here]
            torch.maximum(own_G, logit_G.double(), out=own_G)
        return out_LG

    def _verdict(self, measured: Tensor, divisor: Tensor, logits_LG: Tensor | None = None) -> StepResult:
        loss_tokens, valid_tokens, *batch_digest = (int(v) for v in divisor.tolist())
        count = len(self.losses)
        head = count + 2 + NUM_RIDERS + 2
        *numbers, between, within = measured[:head].tolist()
        sums, squares, wishes, riders = numbers[:count], numbers[count], numbers[count + 1], numbers[count + 2 :]
        if not agree(riders, self.mesh.world.size):
            raise CollectivesDiffer(self.explain())
        norm = squares**0.5
        scale = min(1.0, self.clip_norm / (norm + 1e-6)) if self.clip_norm > 0 else 1.0
        per = {"loss_tokens": max(loss_tokens, 1), "valid_tokens": max(valid_tokens, 1)}
        means = {of.name: total / per[of.divisor] / of.layers for of, total in zip(self.losses, sums, strict=True)}
        mean_loss = means.pop("loss")
        layers, experts = len(self.gpt.moe_layers), self.gpt.config.num_experts
        width = (len(measured) - head) // layers if layers else experts + 1 + LIMBS
        loads = measured[head:].long().view(layers, width).cpu()
        finite = all(map(math.isfinite, (*sums, norm)))
        return StepResult(
            loss=mean_loss,
            auxiliary=means,
            grad_norm=norm,
            grad_scale=scale,
            finite=finite,
            spike=finite and self.is_spike(mean_loss),
            loss_tokens=loss_tokens,
            valid_tokens=valid_tokens,
            stop=wishes > 0,
            loads=loads[:, : experts + 1],
            nearness=loads[:, experts + 1 : -LIMBS],
            tokens_digest=_joined(batch_digest),
            routing_digests=tuple(map(_joined, loads[:, -LIMBS:].tolist())),
            token_bytes_between_nodes=round(between),
            token_bytes_within_nodes=round(within),
            non_finite=() if finite else tuple(name for b in self.buckets.values() for name in b.non_finite()),
            head_logits=None if logits_LG is None else logits_LG.chunk(self.mesh.tp.size, dim=1)[self.mesh.tp.rank],
            max_logit=None if logits_LG is None else logits_LG.max().item(),
        )

    def _router_state(self, result: StepResult, _: None) -> None:
        if result.updates:
            for layer, load, near in zip(self.gpt.moe_layers, result.loads, result.nearness, strict=True):
                if layer not in self.gpt.layers:  # it is in another stage
                    continue
                router = self.gpt.layers[layer].router
                if router.bias_E is not None:
                    router.update_bias(load[:-1].to(self.gpt.device))
                if router.delta is not None:
                    router.update_delta(near)

    def _momentum(self, bucket: str, reads: Sequence[str], *values: Any) -> Tensor:
        assert self.directions is not None, "a step with whole matrices needs the optimizer's directions"
        return self.directions.send(bucket, self._grad_scale(reads, values))

    def _newton_schulz(self, bucket: str, reads: Sequence[str], *values: Any) -> None:
        assert self.directions is not None, "a step with whole matrices needs the optimizer's directions"
        gathered = dict(zip(reads, values, strict=True)).get(f"#whole {bucket}")
        self.directions.direct(bucket, self._grad_scale(reads, values), gathered)

    def _grad_scale(self, reads: Sequence[str], values: Sequence[Any]) -> float | None:
        """None before the verdict, where clipping may want one."""
        result: StepResult | None = dict(zip(reads, values, strict=True)).get("#verdict.-.0")
        if result is not None:
            return result.grad_scale
        return None if self.clip_norm > 0 else 1.0

    def _update(self, name: str, gradient: Tensor, result: StepResult, direction: None = None) -> None:
        self.update(name, result)

    def _evaluated(self, *loss_and_batch: Any) -> Tensor:
        """[2]: this rank's sum of losses, and its share of the number of tokens they are of; nothing where no losses are."""
        *losses, batch = loss_and_batch
        tokens = batch.loss_mask_BS.sum().double() / self.mesh.tp.size
        return torch.stack([losses[0].double(), tokens]) if losses else tokens.new_zeros(2)

    def _scored(self, *losses_and_batch: Any) -> Tensor:
        """[sequences of all ranks that read different ones]: the losses of this rank's part of its own; 0 for those of others,
        and where no losses are."""
        *losses, batch = losses_and_batch
        out = torch.zeros(self.mesh.readers, len(batch.sample_B), dtype=torch.float64, device=batch.sample_B.device)
        if losses:
            out[self.mesh.reader] = losses[0]
        return out.flatten()


def _head(value: str) -> str:
    return value.partition(".")[0]


def _joined(limbs: list[int]) -> int:
    """A 64-bit digest of sums of its limbs."""
    return (limbs[0] & 0xFFFFFFFF) | (limbs[1] & 0xFFFFFFFF) << 32
