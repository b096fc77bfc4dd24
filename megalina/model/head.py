"""The head in torch, and the balance loss over all layers.

Shapes: B sequences, T tokens, A tokens of all R tensor-parallel ranks, D width, V words here, L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.block import Block
from megalina.model.balance import global_balance
from megalina.model.block_functions import BlockFunctions
from megalina.model.late_gradients import Later
from megalina.model.linear import linear
from megalina.model.norm import Norm
from megalina.model.routers import GroupSoFar
from megalina.model.tokens import ALL
from megalina.model.vocabulary import cross_entropy, head_stat


class Balance(BlockFunctions):
    def loads(self, *loads: Tensor) -> Tensor:
        return torch.stack(loads)

    def balance(self, *probs_and_loads: Any) -> Tensor:
        *probs, loads = probs_and_loads
        return self.of_all(probs, loads)

    def balance_of_group(self, *probs_and_groups: Any) -> Tensor:
        """Of a micro-batch's parts: each layer's sums of probabilities, part by part, then each layer's counts of all parts."""
        groups = [g for g in probs_and_groups if isinstance(g, GroupSoFar)]
        layers, probs = len(groups), probs_and_groups[: -len(groups)]
        prob_LE = torch.stack(probs).view(-1, layers, *probs[0].shape).sum(0)
        return self.of_all(list(prob_LE), torch.stack([g.chosen_E for g in groups]))

    def of_all(self, prob_LE: Sequence[Tensor], load_LE: Tensor) -> Tensor:
        """The balance loss over all ranks: own sums of probabilities, and all ranks' loads (columns beyond E don't count)."""
        chosen_LE, top_k = load_LE[:, : self.block.model.num_experts], self.block.router.top_k
        valid = chosen_LE[0].sum() // top_k
        return global_balance(torch.stack(list(prob_LE)), chosen_LE, valid, top_k)


class Head(BlockFunctions):
    """`holder` is the model."""

    def __init__(self, block: Block, model: Any):
        model.final_norm = Norm(block.model.norm_eps)
        super().__init__(block, model)

    def head_norm(self, x_TD: Tensor) -> Tensor:
        return self.holder.final_norm(x_TD)

    def logits(self, n_TD: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self.stat(n_TD, batch, self.share.rank * len(self.weight_VD), later)

    def loss(self, x: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self.loss_behind(self.holder.final_norm, x, batch, later)

    def loss_behind(self, norm: Norm, x: Tensor, batch: Batch, later: Later | None = None) -> Tensor:
        """`x`: the stream before `norm`; with tensor parallelism each rank's statistics."""
        if self.share.ranks == 1:
            return self.sum_of(self.stat(norm(x), batch, later=later).unsqueeze(0), batch)
        return self.sum_of(x.view(self.share.ranks, -1, 2), batch, self.share.own(batch))

    def sequence_losses(self, x: Tensor, batch: Batch) -> Tensor:
        """float64 [B]: of `loss`, what each sequence's own tokens give; `x` as there."""
        stat_RA2 = self.stat(self.holder.final_norm(x), batch)[None] if self.share.ranks == 1 else x.view(self.share.ranks, -1, 2)
        own = self.share.own(batch)
        loss_A = stat_RA2.new_zeros(batch.tokens_BS.numel(), dtype=torch.float64)
        loss_A[own] = self._counted(stat_RA2, batch, own).double()
        return loss_A.view(batch.tokens_BS.shape).sum(1)

    @property
    def weight_VD(self) -> Tensor:
        return self.holder.embedding if self.holder.head is None else self.holder.head

    def all_logits(self, n_TD: Tensor) -> Tensor:
        """[T, V] of the words that are here, padding included."""
        return linear(n_TD, self.weight_VD)

    def stat(self, n_TD: Tensor, batch: Batch, first_word: int = 0, later: Later | None = None) -> Tensor:
        """[T, 2], see `head_stat`."""
        words = min(max(self.block.whole.vocab_size - first_word, 0), len(self.weight_VD))
        return head_stat(n_TD, self.weight_VD, batch.labels_BS.flatten() - first_word, words, later=later)

    def sum_of(self, stat_RA2: Tensor, batch: Batch, own: slice = ALL) -> Tensor:
        """Scalar: the sum of the own tokens' cross entropies, from each rank's statistics of all tokens."""
        return self._counted(stat_RA2, batch, own).sum()

    def _counted(self, stat_RA2: Tensor, batch: Batch, own: slice) -> Tensor:
        """[T]: the own tokens' cross entropies, 0 where they don't count."""
        counts_T = batch.loss_mask_BS.flatten()[own]
        return cross_entropy(stat_RA2[:, own]).where(counts_T, 0.0)
