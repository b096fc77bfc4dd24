"""The embedding in torch.

Shapes: T tokens, D width, V words here.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megalina.batch import Batch
from megalina.model.block_functions import BlockFunctions
from megalina.model.noise import dropout
from megalina.model.tokens import ALL, places


class Embedding(BlockFunctions):
    """`holder` is the model."""

    def embed(self, batch: Batch) -> Tensor:
        x_TD = self.looked_up(batch, self.first_word)
        return x_TD if self.share.ranks > 1 else self.placed(x_TD, batch)

    def positions(self, embedded_TD: Tensor, batch: Batch) -> Tensor:
        return self.placed(embedded_TD, batch, self.share.held(batch))

    @property
    def first_word(self) -> int:
        """The first word of this rank."""
        return self.share.rank * len(self.holder.embedding)

    def looked_up(self, batch: Batch, first_word: int = 0) -> Tensor:
        """[T, D]: the embeddings of those tokens whose words are here (from `first_word` on), zero for others."""
        weight_VD = self.holder.embedding
        word_T = batch.tokens_BS.flatten() - first_word
        if len(weight_VD) == self.block.whole.padded_vocab:
            return F.embedding(word_T, weight_VD)
        here_T = (word_T >= 0) & (word_T < len(weight_VD))
        return F.embedding(word_T.where(here_T, 0), weight_VD) * here_T.unsqueeze(1)

    def placed(self, x_TD: Tensor, batch: Batch, own: slice = ALL) -> Tensor:
        """With learned positions and dropout."""
        model: Any = self.holder
        if model.positions is not None:
            x_TD = x_TD + F.embedding(batch.position_BS.flatten()[own], model.positions)
        if self.block.model.dropout and model.training:
            sample_T, position_T = places(batch, own)
            x_TD = dropout(x_TD, self.block.model.dropout, model.seed, -1, "embedding", sample_T, position_T)
        return x_TD
