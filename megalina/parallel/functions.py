"""The functions of compute instructions: a model's pieces, bound to this rank's place in the mesh.

A function takes the values that its instruction reads, in order, and returns those that it writes, in order.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.collective_log import NUM_RIDERS, CollectiveLog, agree
from megalina.mesh import Mesh
from megalina.model.digest import LIMBS, routing_digest, tokens_digest
from megalina.model.experts import Later
from megalina.model.gpt import GPT
from megalina.model.layers import ALL, Layer, places
from megalina.model.permute import RowOrder, reorder
from megalina.model.routers import GroupSoFar
from megalina.parallel.buckets import Bucket
from megalina.parallel.dispatcher import Counts, by_expert, by_source, cut_index
from megalina.parallel.step_result import CollectivesDiffer, StepResult, Update
from megalina.step.program import Instruction

# Values of a program that a step's measure sums up, losses among them: value -> quantity.
MEASURED = {"loss": "loss", "aux": "balance", "global_aux": "balance", "z": "z", "#load": "load"}
# A step's measure, float64, summed over the world: these sums, the riders of the log of collectives, each MoE layer's load.
NUM_SUMS = 5  # loss, balance, z, squares of gradients, wishes to stop


class StageFunctions:
    """`functions(instruction)` for the executor.

    `wish_to_stop()` is asked once a step on each rank; one wish is enough, and all ranks learn of it in the same step.
    `is_spike(loss)` must answer alike on all ranks.  `explain()`, asked where the ranks' collectives in `log` differ, says how.
    """

    update: Update  # of the step that runs: whoever runs a step sets it

    def __init__(
        self,
        gpt: GPT,
        mesh: Mesh,
        buckets: dict[str, Bucket],
        *,
        sequence: bool,
        clip_norm: float,
        log: CollectiveLog,
        wish_to_stop: Callable[[], bool],
        is_spike: Callable[[float], bool],
        explain: Callable[[], str],
        ledger: bool,
    ):
        self.log, self.is_spike, self.explain, self.ledger = log, is_spike, explain, ledger
        self._late: dict[tuple[str, int, str], Later] = {}  # of instructions whose weights are late: what adds their gradients
        self.gpt, self.mesh, self.buckets, self.clip_norm = gpt, mesh, buckets, clip_norm
        self.wish_to_stop = wish_to_stop
        self.router = gpt.router
        self.cut_activations = sequence and mesh.tp.size > 1
        self.first_word = mesh.tp.rank * len(gpt.embedding)

    def __call__(self, instruction: Instruction) -> Callable[..., Any]:
        if instruction.name.startswith("update "):
            return partial(self._update, instruction.name.removeprefix("update "))
        if instruction.phase == "W":
            return partial(self._add_late, instruction.key)
        named = getattr(self, f"_{instruction.name}")
        if instruction.name in ("seed", "measure"):
            return partial(named, [MEASURED.get(v.split(".")[0], "") for v in instruction.reads])
        if instruction.name in ("experts", "cut", "join"):
            named = partial(named, instruction.chunk)
            later = self._late.setdefault(instruction.key, []) if instruction.late else None
            return named if instruction.name != "experts" else partial(named, self.gpt.layers[instruction.layer], later)
        return partial(named, self.gpt.layers[instruction.layer]) if instruction.layer >= 0 else named

    def own(self, batch: Batch) -> slice:
        """This rank's 1/tp of a micro-batch's tokens."""
        tp = self.mesh.tp
        if tp.size == 1:
            return ALL
        width = batch.tokens_BS.numel() // tp.size
        return slice(tp.rank * width, (tp.rank + 1) * width)

    def _held(self, batch: Batch) -> slice:
        """The tokens whose activations this rank has between attention and MLP."""
        return self.own(batch) if self.cut_activations else ALL

    # embedding
    def _embed(self, batch: Batch) -> Tensor:
        if self.mesh.tp.size > 1:
            return self.gpt.embed(batch, self.first_word)
        return self.gpt.place(self.gpt.embed(batch), batch)

    def _positions(self, embedded: Tensor, batch: Batch) -> Tensor:
        return self.gpt.place(embedded, batch, self._held(batch))

    # attention and dense MLP
    def _attention(self, layer: Layer, x: Tensor, batch: Batch) -> Tensor:
        return layer.attend(x, batch)

    def _attention_norm(self, layer: Layer, x: Tensor) -> Tensor:
        return layer.attention_norm(x)

    def _attention_heads(self, layer: Layer, n: Tensor, batch: Batch) -> Tensor:
        return layer.attention(n, batch)

    def _attention_residual(self, layer: Layer, x: Tensor, added: Tensor, batch: Batch) -> Tensor:
        return layer.attention_residual(x, added, batch, self._held(batch))

    def _mlp(self, layer: Layer, h: Tensor, batch: Batch) -> Tensor:
        return layer.feed(h, batch)

    def _mlp_norm(self, layer: Layer, h: Tensor) -> Tensor:
        return layer.mlp_norm(h)

    def _mlp_hidden(self, layer: Layer, n: Tensor, batch: Batch) -> Tensor:
        return layer.mlp(n)

    def _mlp_residual(self, layer: Layer, h: Tensor, added: Tensor, batch: Batch) -> Tensor:
        return layer.mlp_residual(h, added, batch, self._held(batch))

    # mixture of experts
    def _slice(self, layer: Layer, h: Tensor) -> Tensor:
        width = len(h) // self.mesh.tp.size
        return h[self.mesh.tp.rank * width : (self.mesh.tp.rank + 1) * width].clone()

    def _route(self, layer: Layer, h: Tensor, batch: Batch, so_far: GroupSoFar | None = None) -> tuple[Any, ...]:
        n, logits = layer.score(h)
        routed = self._select(layer, n, logits, logits.detach(), batch, so_far)
        return routed if layer.shared is None else (n, *routed)

    def _score(self, layer: Layer, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, logits = layer.score(h)
        return n, logits, logits.detach()

    def _select(
        self, layer: Layer, n: Tensor, logits: Tensor, all_logits: Tensor, batch: Batch, so_far: GroupSoFar | None = None
    ) -> tuple[Any, ...]:
        own = self.own(batch)
        if so_far is None:
            return self._with_digest(layer.select(n, logits, all_logits, batch, own), batch)
        *selected, so_far = layer.select_part(n, logits, all_logits, batch, own, so_far)
        return *self._with_digest(tuple(selected), batch), so_far

    def _with_digest(self, selected: tuple[Any, ...], batch: Batch) -> tuple[Any, ...]:
        """The load, last of what was selected, gets two more numbers: [E + 1 + LIMBS]."""
        *rest, order, load = selected
        digest = routing_digest(order, *places(batch, self.own(batch))) if self.ledger else load.new_zeros(LIMBS)
        return *rest, order, torch.cat([load, digest])

    def _shared(self, layer: Layer, n: Tensor) -> Tensor:
        return layer.share(n)

    def _experts(self, chunk: tuple[int, int], layer: Layer, later: Later | None, got: Tensor, counts: Counts) -> Tensor:
        sizes = counts.sizes(chunk)
        return by_source(layer.experts(by_expert(got, sizes), sizes.count_e, later), sizes)

    def _add_late(self, key: tuple[str, int, str]) -> None:
        """What backward of this instruction left out."""
        late = self._late[key]
        for add in late:
            add()
        late.clear()

    def _cut(self, chunk: tuple[int, int], rows: Tensor, order: RowOrder) -> tuple[Tensor, ...]:
        """Rows sorted by expert -> each chunk's, an equal share of every expert's."""
        index_N, inverse_N, counts = cut_index(order.count_E, chunk[1])
        return reorder(rows, index_N, inverse_N).split(counts)

    def _join(self, chunk: tuple[int, int], *chunks_and_order: Any) -> Tensor:
        *chunks, order = chunks_and_order
        index_N, inverse_N, _ = cut_index(order.count_E, chunk[1])
        return reorder(torch.cat(chunks), inverse_N, index_N)

    def _mix(self, layer: Layer, h: Tensor, back: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        shared, order, batch = rest if len(rest) == 3 else (None, *rest)
        assert isinstance(order, RowOrder)
        return layer.mix(h, back, weight, shared, order, batch, self.own(batch))

    # losses
    def _loads(self, *loads: Tensor) -> Tensor:
        return torch.stack(loads)

    def _balance(self, *probs_and_loads: Any) -> Tensor:
        *probs, loads = probs_and_loads
        return self.gpt.balance_of_all(probs, loads)

    def _sizes_of_group(self, *batches: Batch) -> GroupSoFar:
        """Of a micro-batch, before the first of its parts is routed in any layer."""
        tokens = torch.stack([b.valid_BS.sum() for b in batches]).sum()
        return GroupSoFar(tokens, tokens.new_zeros(self.gpt.config.num_experts))

    def _balance_of_group(self, *probs_and_groups: Any) -> Tensor:
        """Of a micro-batch's parts: each layer's sums of probabilities, part by part, then each layer's counts of all parts."""
        layers = len(self.gpt.moe_layers)
        probs, groups = probs_and_groups[:-layers], probs_and_groups[-layers:]
        prob_LE = torch.stack(probs).view(-1, layers, *probs[0].shape).sum(0)
        return self.gpt.balance_of_all(list(prob_LE), torch.stack([g.chosen_E for g in groups]))

    def _head_norm(self, x: Tensor) -> Tensor:
        return self.gpt.final_norm(x)

    def _logits(self, n: Tensor, batch: Batch) -> Tensor:
        return self.gpt.stat(n, batch, self.first_word)

    def _loss(self, x: Tensor, batch: Batch) -> Tensor:
        if self.mesh.tp.size == 1:
            return self.gpt.loss(self.gpt.stat(self.gpt.final_norm(x), batch).unsqueeze(0), batch)
        return self.gpt.loss(x.view(self.mesh.tp.size, -1, 2), batch, self.own(batch))

    # without autograd
    def _sizes(self, *batches: Batch) -> Tensor:
        loss_tokens = torch.stack([b.loss_mask_BS.sum() for b in batches]).sum()
        valid_tokens = torch.stack([b.valid_BS.sum() for b in batches]).sum()
        digest = torch.stack([tokens_digest(b) if self.ledger else loss_tokens.new_zeros(LIMBS) for b in batches]).sum(0)
        return torch.cat([torch.stack([loss_tokens, valid_tokens]), digest]).double()

    def _seed(self, kinds: list[str], divisor: Tensor, *losses: Tensor) -> tuple[Tensor, ...]:
        """The gradient of what is minimised with respect to each loss."""
        per_loss, per_valid = (1.0 / divisor[:2].clamp(min=1)).unbind()
        weights = {"z": self.router.z_loss * per_valid, "balance": self.router.balance_loss * per_valid, "loss": per_loss}
        return tuple(weights[kind].to(value.dtype) for kind, value in zip(kinds[1:], losses, strict=True))

    def _measure(self, kinds: list[str], *values: Any) -> Tensor:
        """float64: sums of losses and squares over this rank, and its loads."""
        sums = dict.fromkeys(("loss", "balance", "z"), torch.zeros((), dtype=torch.float64, device=self.gpt.embedding.device))
        loads = [value for kind, value in zip(kinds, values, strict=True) if kind == "load"]
        for kind, value in zip(kinds, values, strict=True):
            if kind in sums:
                sums[kind] = sums[kind] + value.double()
        squares = torch.stack([b.square_sum() for b in self.buckets.values()]).sum()
        layers = len(self.gpt.moe_layers)
        load = torch.stack(loads).view(-1, layers, loads[0].numel()).sum(0).double().flatten() if layers else squares.new_zeros(0)
        own = squares.new_tensor([float(self.wish_to_stop()), *self.log.riders()])
        return torch.cat([torch.stack([sums["loss"], sums["balance"], sums["z"], squares]), own, load])

    def _verdict(self, measured: Tensor, divisor: Tensor) -> StepResult:
        loss_tokens, valid_tokens, *batch_digest = (int(v) for v in divisor.tolist())
        loss, balance, z, squares, wishes, *riders = measured[: NUM_SUMS + NUM_RIDERS].tolist()
        if not agree(riders, self.mesh.world.size):
            raise CollectivesDiffer(self.explain())
        layers = max(len(self.gpt.moe_layers), 1)
        norm = squares**0.5
        scale = min(1.0, self.clip_norm / (norm + 1e-6)) if self.clip_norm > 0 else 1.0
        valid = max(valid_tokens, 1)
        mean_loss = loss / max(loss_tokens, 1)
        loads = (
            measured[NUM_SUMS + NUM_RIDERS :].long().view(len(self.gpt.moe_layers), self.gpt.config.num_experts + 1 + LIMBS).cpu()
        )
        finite = all(map(math.isfinite, (loss, balance, z, norm)))
        return StepResult(
            loss=mean_loss,
            balance_loss=balance / valid / layers,
            z_loss=z / valid / layers,
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
            non_finite=() if finite else tuple(name for b in self.buckets.values() for name in b.non_finite()),
        )

    def _router_bias(self, result: StepResult, _: None) -> None:
        if result.updates:
            for layer, load in zip(self.gpt.moe_layers, result.loads, strict=True):
                self.gpt.layers[layer].router.update_bias(load[:-1].to(self.gpt.embedding.device))

    def _update(self, name: str, gradient: Tensor, result: StepResult) -> None:
        self.update(name, result)

    def _evaluated(self, loss: Tensor, batch: Batch) -> Tensor:
        """[2]: this rank's sum of losses, and its share of the number of tokens they are of."""
        return torch.stack([loss.double(), batch.loss_mask_BS.sum().double() / self.mesh.tp.size])


def _joined(limbs: list[int]) -> int:
    """A 64-bit digest of sums of its limbs."""
    return (limbs[0] & 0xFFFFFFFF) | (limbs[1] & 0xFFFFFFFF) << 32
