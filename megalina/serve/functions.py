"""The functions of an inference step's compute instructions: a model whose experts sit in slots.

T tokens of this rank, K choices a token, E experts, N devices (the ranks), S slots a device, Q = N x S slots in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.mesh import Mesh
from megalina.model.attention import KeyValues
from megalina.model.dispatcher import Counts, by_expert, by_source
from megalina.model.gpt import GPT, Layer
from megalina.model.permute import RowOrder, permute, reorder, row_order
from megalina.model.rows import expert_rows
from megalina.model.tokens import ALL, router_tokens
from megalina.parallel.emulated_device import ServingDevice
from megalina.placement.chosen_slots import chosen_slots, first_slots
from megalina.placement.controller import Controller, Foreseen
from megalina.placement.placement import EMPTY, Placement
from megalina.placement.predictors.predictor import Floats, Ids, Seen
from megalina.serve.once_rows import pack, unpack
from megalina.serve.slot_counts import SlotCounts
from megalina.serve.slots import Slots
from megalina.step.program import Instruction

Reroute = Callable[[int, Tensor], Tensor]  # MoE layer, what its router chose [T, K] -> what is done


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceFunctions:
    """`functions(instruction)` for the executor.  All that they hand on within a batch are values of the program.

    `tile`: rows that a kernel gets at a time, always so many, so that what becomes of a row doesn't depend on the others; 0: all
    at once, which is faster.  `device`: an emulated one, which gets the number of rows that its experts have; or None."""

    gpt: GPT
    mesh: Mesh
    slots: Slots
    controller: Controller
    tile: int
    device: ServingDevice | None
    once: bool = False  # a token travels once to each device that has experts of it

    def __call__(self, instruction: Instruction) -> Callable[..., Any]:
        if instruction.layer >= 0 and self.gpt.blocks.is_own(instruction.layer, instruction.name):
            return self.gpt.functions_of(instruction).bind(instruction, None)
        named = getattr(self, f"_{instruction.name}")
        if instruction.layer < 0:
            return named
        if instruction.name == "foresee":
            return partial(named, self._number(instruction))
        if instruction.name in ("join", "unpack"):
            return named
        layer = self.gpt.layers[instruction.layer]
        if instruction.name == "experts":
            return partial(named, instruction.chunk, layer, self._number(instruction))
        if instruction.name in ("score", "assign"):
            return partial(named, layer, self._number(instruction))
        return partial(named, layer)

    def _number(self, instruction: Instruction) -> int:
        """Of its layer among MoE layers."""
        return self.gpt.moe_layers.index(instruction.layer)

    # what is no mixture of experts
    def _embed(self, batch: Batch) -> Tensor:
        return self.gpt.embedder.embed(batch)

    def _attention(self, layer: Layer, x: Tensor, batch: Batch, past: Sequence[KeyValues] | None) -> Tensor:
        return layer.attend(x, batch, past[layer.index] if past is not None else None)

    def _mlp(self, layer: Layer, h: Tensor, batch: Batch) -> Tensor:
        return layer.feed(h, batch)

    def _final(self, x: Tensor) -> Tensor:
        return self.gpt.final_norm(x)

    # mixture of experts
    def _score(
        self,
        layer: Layer,
        number: int,
        h: Tensor,
        batch: Batch,
        reroute: Reroute | None,
        planned: Foreseen,
        seen: tuple[Ids, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Ids, ...], Tensor, slice]:
        """`seen`: [T, K] that this batch's tokens, without padding, chose in each MoE layer before; returned with this one's.

        What is exchanged: rows for each expert here, whether the fetch for this layer did not come, a fingerprint of the plan,
        what is expected of the layer, what is to be learned from it (at the slice that is returned), features of the next one
        (all three none where nothing is predicted)."""
        n_TD, logits_TE = layer.moe.scores(h)
        routing = layer.router(logits_TE, router_tokens(batch), logits_TE, ALL)
        chosen_TK = routing.expert_TK if reroute is None else reroute(number, routing.expert_TK)
        count_E = torch.bincount(chosen_TK.flatten(), minlength=layer.num_experts + 1)[: layer.num_experts].double()
        ready = self.slots.ready(number)
        told = [count_E, count_E.new_tensor([float(not ready), self.slots.fingerprint(number)])]
        told += [] if planned.expected_E is None else [torch.from_numpy(planned.expected_E).to(count_E)]
        own_TK: Ids = chosen_TK[batch.valid_BS.flatten()].cpu().numpy()
        seen_now, begin, length = (*seen, own_TK), sum(map(len, told)), 0
        policy = self.controller.policy
        if policy.predictor is not None:
            evidence = policy.predictor.evidence(number, Seen(seen), own_TK)
            length = len(evidence)
            told.append(torch.from_numpy(evidence).to(count_E))
            if number + 1 < len(self.gpt.moe_layers):
                ahead_E = self._look_ahead(number + 1, h, batch) if policy.looks_ahead else None
                features = policy.predictor.features(number + 1, Seen(seen_now, ahead_E))
                told.append(torch.from_numpy(features).to(count_E))
        return n_TD, routing.weight_TK, chosen_TK, seen_now, torch.cat(told), slice(begin, begin + length)

    def _foresee(self, number: int, heard: Any, evidence: slice | None = None) -> Foreseen:
        """Plan the layer, and begin to fetch.  `heard`, `evidence`: of the MoE layer before; the first one has the batch."""
        predictor = self.controller.policy.predictor
        present = self.slots.placement(number)
        if predictor is None:
            return Foreseen(present)
        if evidence is None:
            features = predictor.features(0, Seen(()))
        else:
            features = self._by_rank(heard)[:, evidence.stop :].sum(0)
        planned = self.controller.foresee(number, features, present)
        if planned.placement is not present:
            self.slots.fetch(number, planned.placement)
        return planned

    def _assign(
        self, layer: Layer, number: int, n_TD: Tensor, chosen_TK: Tensor, heard: Tensor, planned: Foreseen
    ) -> tuple[Any, ...]:
        """Rows in their order, the split over slots, the sizes of both ways, and what came of the plan.  Where tokens travel once
        to a device: packed rows and their order first."""
        heard_RV = self._by_rank(heard)
        num_experts = layer.num_experts
        count_RE = heard_RV[:, :num_experts].astype(np.int64)
        failed_R, print_R = heard_RV[:, num_experts], heard_RV[:, num_experts + 1]
        if failed_R.any() or (print_R != print_R[0]).any():  # experts did not come, or plans differ: all stay with what they have
            self.slots.discard(number)
        else:
            self.slots.install(number)
        placement = self.slots.placement(number)
        expected_E = None
        if planned.expected_E is not None:
            expected_E = heard_RV[0, num_experts + 2 : 2 * num_experts + 2]
        decided, split_REN, outcome = self.controller.decide(number, count_RE, placement, expected_E)
        if decided is not placement:
            self.slots.fetch(number, decided)
            self.slots.ready(number)
            self.slots.install(number)
            placement = self.slots.placement(number)
        order, counts = self._dispatch(placement, chosen_TK, split_REN)
        if not self.once:
            return permute(n_TD, order), order, counts, outcome
        packed_UC, way = pack(n_TD, order, placement.slots_per_device)
        return packed_UC, way, order, counts, outcome

    def _unpack(self, got_UC: Tensor, way: Counts, counts: SlotCounts) -> Tensor:
        return unpack(got_UC, way.sizes((0, 1)).receive_R, counts.num_slots, self.gpt.config.d_model)

    def _dispatch(self, placement: Placement, chosen_TK: Tensor, split_REN: np.ndarray[Any, Any]) -> tuple[RowOrder, SlotCounts]:
        """Slots are to the dispatcher what experts are in training: rows travel sorted by slot."""
        me, slots = self.mesh.ep.rank, placement.slots_per_device
        slot_EN, num_slots = first_slots(placement), placement.num_devices * slots
        slot_TK = torch.from_numpy(chosen_slots(chosen_TK.cpu().numpy(), split_REN[me], slot_EN, num_slots))
        order = row_order(slot_TK.to(chosen_TK.device), num_slots)
        here = [(slot, expert) for slot, expert in enumerate(placement.slots[me]) if slot_EN[expert, me] == me * slots + slot]
        received_RS = np.zeros((len(split_REN), slots), np.int64)
        for slot, expert in here:
            if expert != EMPTY:
                received_RS[:, slot] = split_REN[:, expert, me]
        return order, SlotCounts(order.count_E, torch.from_numpy(received_RS))

    def _experts(self, chunk: tuple[int, int], layer: Layer, number: int, got: Tensor, counts: SlotCounts) -> Tensor:
        sizes = counts.sizes(chunk)
        if self.device is not None:
            self.device.give(sum(sizes.count_e))
        slots = zip(counts.slots_of(chunk), sizes.count_e, strict=True)
        weights = [self.slots.weights(number, slot) if count else None for slot, count in slots]
        rows_ND = by_expert(got, sizes)
        out_ND = expert_rows(rows_ND, sizes.count_e, weights, activation=layer.experts.activation, tile=self.tile)
        return by_source(out_ND, sizes)

    def _join(self, *chunks_and_counts: Any) -> Tensor:
        """All chunks' rows in the order in which they left: answers are added up as without chunks."""
        *chunks, counts = chunks_and_counts
        return reorder(torch.cat(chunks), *counts.join_index(len(chunks)))

    def _shared(self, layer: Layer, n: Tensor) -> Tensor:
        return layer.moe.shared(n)

    def _mix(self, layer: Layer, h: Tensor, back: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        shared, order, batch = rest if len(rest) == 3 else (None, *rest)
        return layer.moe.mixed(h, back, weight, shared, order, batch)

    def _learn(self, *of_layers: Any) -> None:
        """Three values of each MoE layer: what was heard, where the evidence is in it, what had been foreseen."""
        for number, (heard, evidence, planned) in enumerate(zip(of_layers[::3], of_layers[1::3], of_layers[2::3], strict=True)):
            assert planned.features is not None
            self.controller.learn(number, planned.features, self._by_rank(heard)[:, evidence].sum(0))

    def _look_ahead(self, number: int, h_TD: Tensor, batch: Batch) -> Floats:
        """Rows for each expert, would MoE layer `number` route what its predecessor has read."""
        layer = self.gpt.layers[self.gpt.moe_layers[number]]
        logits_TE = layer.moe.scores(h_TD)[1]
        chosen = layer.router(logits_TE, router_tokens(batch), logits_TE, ALL).expert_TK.flatten()
        return torch.bincount(chosen, minlength=layer.num_experts + 1)[: layer.num_experts].double().cpu().numpy()

    def _by_rank(self, heard: Tensor) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = heard.cpu().numpy()
        return array.reshape(self.mesh.ep.size, -1)
