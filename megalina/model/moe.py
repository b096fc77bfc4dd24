"""A mixture of experts in torch: its weights and its functions.

Shapes: T own tokens, A all tokens of the micro-batch, D model width, N routed rows, E experts, K experts a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.activation import activation_of
from megalina.blocks.moe import MoE as MoEBlock
from megalina.blocks.sizes import LIMBS
from megalina.model.block_functions import BlockFunctions, Routed, Seen
from megalina.model.digest import routing_digest
from megalina.model.dispatcher import Counts, by_expert, by_source, cut_index
from megalina.model.experts import expert_mlp
from megalina.model.init import spec_of
from megalina.model.late_gradients import Later
from megalina.model.linear import linear
from megalina.model.mlp import Mlp, TwoMatrices
from megalina.model.norm import Norm
from megalina.model.permute import Places, RowOrder, permute, places_of, reorder, row_order, unpermute
from megalina.model.routers import GroupSoFar, Router, Routing, router_class
from megalina.model.tokens import ALL, OwnTokens, all_in_order, among_all, places, router_tokens
from megalina.reference import load
from megalina.step.program import Instruction


class Experts(TwoMatrices):
    """The routed experts that this device holds."""

    def release(self) -> None:
        """Let go of all weights: the experts are computed elsewhere."""
        for name in list(self._parameters):
            del self._parameters[name]

    def forward(self, rows_ND: Tensor, count_E: list[int], later: Later | None = None) -> Tensor:
        """Rows sorted by expert, `count_E` of them each."""
        return expert_mlp(rows_ND, count_E, self.w1, self.w2, self.b1, self.b2, activation=self.activation, later=later)


class MoE(BlockFunctions):
    block: MoEBlock
    chunked: Sequence[str] = ("experts", "cut", "join")  # functions that get the chunk's number

    def __init__(self, block: MoEBlock, layer: Any):
        model = block.model
        layer.mlp_norm = Norm(model.norm_eps)
        make: type[Router] = router_class(block.router)
        layer.router = make(block.router, num_experts=model.num_experts, layer=layer.index, seed=layer.seed, width=model.d_model)
        layer.experts = Experts(activation_of(model))
        layer.shared = Mlp(activation_of(model)) if model.shared_d_ff else None
        self.num_experts = model.num_experts
        self.own_losses = [load(loss.functions) for loss in block.router_losses]
        super().__init__(block, layer)
        self._places: Places | None = None
        if layer.expert_order:
            self.lay(layer.expert_order)

    def lay(self, order: tuple[int, ...]) -> None:
        """From now on the expert in each place is this one."""
        self.holder.expert_order, self._places = order, None
        for p in self.holder.experts.parameters():
            p.spec = replace(spec_of(p), order=order)

    def places(self, device: torch.device) -> Places | None:
        """Where the experts of this layer lie; None: expert i in place i."""
        if self.holder.expert_order and self._places is None:
            self._places = places_of(self.holder.expert_order, device)
        return self._places

    def bind(self, instruction: Instruction, later: Later | None) -> Callable[..., Any]:
        function = super().bind(instruction, later)
        return partial(function, instruction.chunk) if instruction.name in self.chunked else function

    # instructions
    def slice(self, h_TD: Tensor) -> Tensor:
        width = len(h_TD) // self.share.ranks
        return h_TD[self.share.rank * width : (self.share.rank + 1) * width].clone()

    def route(
        self, h_TD: Tensor, batch: Batch, so_far: GroupSoFar | None = None, *, later: Later | None = None
    ) -> tuple[Any, ...]:
        n_TD, logits_TE = self.scores(h_TD, later)
        routed = self.select(n_TD, logits_TE, logits_TE.detach(), batch, so_far)
        return routed if self.holder.shared is None else (n_TD, *routed)

    def score(self, h_TD: Tensor, *, later: Later | None = None) -> tuple[Tensor, Tensor, Tensor]:
        n_TD, logits_TE = self.scores(h_TD, later)
        return n_TD, logits_TE, logits_TE.detach()

    def select(
        self, n_TD: Tensor, logits_TE: Tensor, logits_AE: Tensor, batch: Batch, so_far: GroupSoFar | None = None
    ) -> tuple[Any, ...]:
        """As `selected`; the load ends with two numbers more, LIMBS, a digest of the choices or zeros."""
        own = self.share.own(batch)
        logits_AE = all_in_order(logits_AE, batch)
        *rest, order, load, passed = self.selected(n_TD, logits_TE, logits_AE, batch, among_all(batch, own), so_far)
        digest = routing_digest(order, *places(batch, own)) if self.holder.digests else load.new_zeros(LIMBS)
        selected = (*rest, order, torch.cat([load, digest]))
        return selected if so_far is None else (*selected, passed)

    def shared(self, n_TD: Tensor, *, later: Later | None = None) -> Tensor:
        shared = self.holder.shared
        out_TD = shared(n_TD, later=later)
        out_TD = out_TD if shared.b2 is None else out_TD + shared.b2
        return linear(n_TD, shared.gate, later=later).sigmoid() * out_TD if self.block.model.shared_gate else out_TD

    def experts(self, chunk: tuple[int, int], got_ND: Tensor, counts: Counts, *, later: Later | None = None) -> Tensor:
        sizes = counts.sizes(chunk)
        return by_source(self.holder.experts(by_expert(got_ND, sizes), sizes.count_e, later), sizes)

    def cut(self, chunk: tuple[int, int], rows_ND: Tensor, order: RowOrder) -> tuple[Tensor, ...]:
        """Rows sorted by expert -> each chunk's, an equal share of every expert's."""
        index_N, inverse_N, counts = cut_index(order.count_E, chunk[1])
        return reorder(rows_ND, index_N, inverse_N).split(counts)

    def join(self, chunk: tuple[int, int], *chunks_and_order: Any) -> Tensor:
        *chunks, order = chunks_and_order
        index_N, inverse_N, _ = cut_index(order.count_E, chunk[1])
        return reorder(torch.cat(chunks), inverse_N, index_N)

    def mix(self, h_TD: Tensor, back_ND: Tensor, weight_TK: Tensor, *rest: Any) -> Tensor:
        shared_TD, order, batch = rest if len(rest) == 3 else (None, *rest)
        return self.mixed(h_TD, back_ND, weight_TK, shared_TD, order, batch, self.share.own(batch))

    # of which they are made
    def scores(self, h_TD: Tensor, later: Later | None = None) -> tuple[Tensor, Tensor]:
        """The normed tokens and the router's logits."""
        n_TD = self.holder.mlp_norm(h_TD)
        router = self.holder.router
        return n_TD, router.logits(n_TD) if later is None else router.logits(n_TD, later)

    def selected(
        self,
        n_TD: Tensor,
        logits_TE: Tensor,
        logits_AE: Tensor,
        batch: Batch,
        own: OwnTokens = ALL,
        so_far: GroupSoFar | None = None,
    ) -> tuple[Any, ...]:
        """Rows for the experts in the order of experts, their weights, the losses, the order, the load, and of a part of a
        micro-batch (`so_far`) what the part after it must know.

        `logits_AE`: of all tokens of the micro-batch in order, without gradient; `own`: which of them are `n_TD`.
        The first loss is the balance loss; with `router.group=global`, and of a part of a micro-batch, the sums of probabilities
        [E] it is made of.  Load: int64 [E + 1], tokens that chose each expert, and choices lost to capacity; with a capacity
        bound NEARNESS_BINS more, how near tokens are to their experts' rows.
        """
        tokens = router_tokens(batch)
        group = () if so_far is None else (so_far,)
        routing: Routing = self.holder.router(logits_TE, tokens, logits_AE, own, *group)
        balance = routing.prob_E if self.block.is_global or so_far is not None else routing.balance
        more = [loss for loss in (routing.locality, routing.information) if loss is not None]
        own_losses = [loss(logits_TE, routing.expert_TK, tokens.valid_A[own]) for loss in self.own_losses]
        order = row_order(routing.expert_TK, self.num_experts, self.places(n_TD.device))
        near = self.holder.router.nearness(n_TD, logits_TE, routing)
        load = torch.cat([routing.chosen_E, routing.dropped.reshape(1), near])
        return permute(n_TD, order), routing.weight_TK, balance, routing.z, *more, *own_losses, order, load, routing.so_far

    def mixed(
        self,
        h_TD: Tensor,
        back_ND: Tensor,
        weight_TK: Tensor,
        shared_TD: Tensor | None,
        order: RowOrder,
        batch: Batch,
        own: OwnTokens = ALL,
    ) -> Tensor:
        """The residual plus each token's experts by weight, plus the shared experts."""
        layer = self.holder
        if shared_TD is None and not (layer.rate and layer.training):
            return unpermute(h_TD, back_ND, weight_TK, order)
        added_TD = unpermute(torch.zeros_like(h_TD) if shared_TD is None else shared_TD, back_ND, weight_TK, order)
        return layer.residual(h_TD, added_TD, None, "mlp", batch, own)

    def forward(self, h_TD: Tensor, batch: Batch, seen: Seen, past: Any = None) -> Tensor:
        n_TD, logits_TE = self.scores(h_TD)
        rows_ND, weight_TK, *losses, order, load, _ = self.selected(n_TD, logits_TE, logits_TE.detach(), batch)
        back_ND = self.holder.experts(rows_ND, order.count_E.tolist())
        shared_TD = self.shared(n_TD) if self.holder.shared is not None else None
        seen.routed.append(Routed(logits_TE, weight_TK, tuple(losses), order, load))
        return self.mixed(h_TD, back_ND, weight_TK, shared_TD, order, batch)
