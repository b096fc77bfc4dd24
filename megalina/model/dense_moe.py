"""Dense training, sparse inference in torch (DS-MoE, Pan et al. 2024, section 3): its router and its functions.

In training all experts compute every token, each output weighted by its probability.  A trained model may be asked to use few
experts of each token, a `Selection`; their weights stay as they are, and the others' parts are left out.

Shapes: T own tokens, A all tokens of the micro-batch, D model width, N tokens that experts here get, E experts, K columns of a
routing, G groups of tokens.
"""

from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.selection import Selection
from megalina.blocks.sizes import LIMBS
from megalina.model.all_experts import all_experts_mlp
from megalina.model.block_functions import Routed, Seen
from megalina.model.digest import choices_digest
from megalina.model.dispatcher import share_of_chunk
from megalina.model.late_gradients import Later
from megalina.model.moe import MoE
from megalina.model.mutual_information import mutual_information_loss
from megalina.model.routers import GroupSoFar, Router, Routing, z_loss
from megalina.model.sparse_selection import selected
from megalina.model.tokens import ALL, OwnTokens, RouterTokens, all_in_order, among_all, places, router_tokens


class Dense(Router):
    """Every expert of every token, with its probability; in evaluation those of `selection`.  No expert is idle in training."""

    selection: Selection | None = None  # of inference; None: all experts

    def routed(
        self,
        logits_TE: Tensor,
        tokens: RouterTokens,
        logits_AE: Tensor,
        own: OwnTokens,
        clean_TE: Tensor,
        before: GroupSoFar | None,
    ) -> Routing:
        config, num_experts = self.config, self.num_experts
        log_TE = logits_TE.log_softmax(dim=1) if config.mutual_information_loss else None
        prob_TE = logits_TE.softmax(dim=1)
        valid_T = tokens.valid_A[own]
        nobody_T1 = ~valid_T.unsqueeze(1) if tokens.may_have_padding else None
        if self.selection is not None and not self.training:
            expert_TK, weight_TK = selected(self.selection, prob_TE, valid_T)
            chosen_E = torch.bincount(expert_TK.flatten(), minlength=num_experts + 1)[:num_experts]
        else:
            expert_TK = torch.arange(num_experts, device=prob_TE.device).expand(len(prob_TE), -1)
            weight_TK, chosen_E = prob_TE, valid_T.sum().expand(num_experts)
            if nobody_T1 is not None:
                expert_TK = expert_TK.masked_fill(nobody_T1, num_experts)
                weight_TK = weight_TK.masked_fill(nobody_T1, 0.0)
        weight_TK = weight_TK if config.scale == 1.0 else weight_TK * config.scale
        zero = logits_TE.new_zeros(())
        information = None
        if log_TE is not None:
            groups = tokens.by_sequence if config.group == "sequence" else tokens.together
            information = mutual_information_loss(log_TE, logits_AE.log_softmax(dim=1), groups, own)
        return Routing(
            expert_TK,
            weight_TK,
            balance=zero,
            z=z_loss(clean_TE, tokens, own, config.z_loss),
            chosen_E=chosen_E,
            dropped=torch.zeros_like(chosen_E[0]),
            information=information,
            prob_TE=prob_TE.detach(),
            valid_T=tokens.counted(prob_TE.dtype)[own],
        )


class DenseMoE(MoE):
    """Some of its instructions read other values than those of their name in a mixture of experts."""

    chunked = ("cut",)

    # instructions
    def select(
        self, n_TD: Tensor, logits_TE: Tensor, logits_AE: Tensor, batch: Batch, so_far: GroupSoFar | None = None
    ) -> tuple[Any, ...]:
        """The tokens that experts get, their weights [T, E], the losses, and the load as of any mixture of experts."""
        own = self.share.own(batch)
        logits_AE = all_in_order(logits_AE, batch)
        rows_TD, routing, losses = self.weighed(n_TD, logits_TE, logits_AE, batch, among_all(batch, own))
        load = torch.cat([routing.chosen_E, routing.dropped.reshape(1)])
        digest = choices_digest(routing.expert_TK, *places(batch, own)) if self.holder.digests else load.new_zeros(LIMBS)
        return rows_TD, routing.weight_TK, *losses, torch.cat([load, digest])

    def experts(self, got_ND: Tensor, weight_NE: Tensor, *, later: Later | None = None) -> Tensor:  # type: ignore[override]
        """`weight_NE`: of all experts; those here take theirs."""
        experts, first = self.holder.experts, self.holder.first_expert
        here_NE = weight_NE[:, first : first + len(experts.w1)]
        return all_experts_mlp(
            got_ND, here_NE, experts.w1, experts.w2, experts.b1, experts.b2, activation=experts.activation, later=later
        )

    def cut(self, chunk: tuple[int, int], rows_TD: Tensor, weight_TE: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Each chunk's tokens, then each chunk's weights."""
        tokens = torch.tensor(len(rows_TD))
        counts = [int(share_of_chunk(tokens, c, chunk[1])) for c in range(chunk[1])]
        return *rows_TD.split(counts), *weight_TE.split(counts)

    def join(self, *chunks: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat(chunks)

    def mix(self, h_TD: Tensor, back_TD: Tensor, *rest: Any) -> Tensor:
        shared_TD, batch = rest if len(rest) == 2 else (None, *rest)
        added_TD = back_TD if shared_TD is None else back_TD + shared_TD
        return self.holder.residual(h_TD, added_TD, None, "mlp", batch, self.share.own(batch))

    # of which they are made
    def weighed(
        self, n_TD: Tensor, logits_TE: Tensor, logits_AE: Tensor, batch: Batch, own: OwnTokens = ALL
    ) -> tuple[Tensor, Routing, list[Tensor]]:
        """The tokens, without padding; the routing; the losses in the order of the block's."""
        tokens = router_tokens(batch)
        routing: Routing = self.holder.router(logits_TE, tokens, logits_AE, own)
        own_losses = [loss(logits_TE, routing.expert_TK, tokens.valid_A[own]) for loss in self.own_losses]
        information = [] if routing.information is None else [routing.information]
        # Padding may hold anything, also numbers that aren't finite: times zero they would spread.
        rows_TD = n_TD.masked_fill(~tokens.valid_A[own, None], 0.0) if tokens.may_have_padding else n_TD
        return rows_TD, routing, [routing.balance, routing.z, *information, *own_losses]

    def forward(self, h_TD: Tensor, batch: Batch, seen: Seen, past: Any = None) -> Tensor:
        """All experts; those of the router's selection where there is one."""
        if self.holder.router.selection is not None and not self.holder.training:
            return super().forward(h_TD, batch, seen, past)
        n_TD, logits_TE = self.scores(h_TD)
        rows_TD, routing, losses = self.weighed(n_TD, logits_TE, logits_TE.detach(), batch)
        load = torch.cat([routing.chosen_E, routing.dropped.reshape(1)])
        seen.routed.append(Routed(logits_TE, routing.weight_TK, tuple(losses), None, load))
        shared = [] if self.holder.shared is None else [self.shared(n_TD)]
        return self.mix(h_TD, self.experts(rows_TD, routing.weight_TK), *shared, batch)
