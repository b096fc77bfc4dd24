"""Multi-token prediction in torch (DeepSeek-V3 technical report, arXiv:2412.19437, section 2.2): its weights and its functions.

A row's words are rolled inside the row; positions are not.  A token has a loss where the words that it is given are of its own
document: what comes around the end of a row, or of a document, does not count.

Shapes: B sequences, S tokens a sequence, T tokens, D width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.block import Block
from megalina.model.block_functions import BlockFunctions, Seen, no_parameters
from megalina.model.embedding import Embedding
from megalina.model.head import Head
from megalina.model.late_gradients import Later
from megalina.model.linear import linear
from megalina.model.norm import Norm


def ahead(batch: Batch, depth: int) -> Batch:
    """The batch as a layer of multi-token prediction sees it: at each place the word `depth` places further on, its label, and
    whether this counts for the token of the place."""
    if batch.cut_from is not None:  # words further on may be another rank's
        return batch.once(_part_ahead, depth)
    return batch.once(_ahead, depth)


def _part_ahead(batch: Batch, depth: int) -> Batch:
    return ahead(batch.uncut, depth).part_of(batch.contexts, batch.context)


def _ahead(batch: Batch, depth: int) -> Batch:
    tokens_BS, labels_BS, counts_BS = (v.roll(-depth, 1) for v in (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS))
    place_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    counts_BS = counts_BS & batch.valid_BS & (place_S < len(place_S) - depth)
    if batch.document_BS is not None:
        counts_BS &= batch.document_BS == batch.document_BS.roll(-depth, 1)
    return replace(batch, tokens_BS=tokens_BS, labels_BS=labels_BS, loss_mask_BS=counts_BS)


class Weights(nn.Module):
    projection: Tensor  # [D, 2D], its first columns are of the embedding

    def __init__(self, eps: float):
        super().__init__()
        self.embedding_norm, self.hidden_norm = Norm(eps), Norm(eps)
        no_parameters(self, "projection")
        self.norm = Norm(eps)


class _OfMtp(BlockFunctions):
    @property
    def depth(self) -> int:
        """How many words further ahead than the head this layer predicts."""
        index: int = self.holder.index
        return index - self.block.model.num_layers + 1


class Mtp(_OfMtp):
    """`attach` tells it what it shares with the rest of the model."""

    def __init__(self, block: Block, layer: Any):
        layer.mtp = Weights(block.model.norm_eps)
        super().__init__(block, layer)

    def attach(self, embedder: Embedding, before: Norm) -> None:
        """`before`: the norm behind the layer before this one."""
        self.embedder, self.before = embedder, before

    def mtp(self, x_TD: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self.mtp_merge(x_TD, self.embedder.looked_up(ahead(batch, self.depth)), later=later)

    def mtp_embed(self, batch: Batch) -> Tensor:
        return self.embedder.looked_up(ahead(batch, self.depth), self.embedder.first_word)

    def mtp_merge(self, x_TD: Tensor, embedded_TD: Tensor, *, later: Later | None = None) -> Tensor:
        own: Weights = self.holder.mtp
        both = torch.cat([own.embedding_norm(embedded_TD), own.hidden_norm(self.before(x_TD))], dim=1)
        return linear(both, own.projection, later=later)

    def forward(self, x_TD: Tensor, batch: Batch, seen: Seen, past: Any = None) -> Tensor:
        return self.mtp(x_TD, batch)


class MtpHead(_OfMtp):
    def attach(self, output: Head) -> None:
        """The head, whose matrix it shares."""
        self.output = output

    def targets(self, batch: Batch) -> Batch:
        return ahead(batch, self.depth)

    def mtp_head_norm(self, x_TD: Tensor) -> Tensor:
        return self.holder.mtp.norm(x_TD)

    def mtp_logits(self, n_TD: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self.output.logits(n_TD, self.targets(batch), later=later)

    def mtp_loss(self, x: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self.output.loss_behind(self.holder.mtp.norm, x, self.targets(batch), later)
