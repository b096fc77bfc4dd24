"""A dense MLP in torch: its weights and its functions.

Shapes: T tokens (or this rank's share of them), D model width, F hidden width.
"""

from typing import Any

from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.activation import Activation, activation_of
from megalina.blocks.block import Block
from megalina.model.block_functions import BlockFunctions, no_parameters
from megalina.model.experts import mlp
from megalina.model.late_gradients import Later
from megalina.model.norm import Norm
from megalina.model.tokens import ALL


class TwoMatrices(nn.Module):
    """The weights of an MLP, or of several."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None

    def __init__(self, activation: Activation):
        super().__init__()
        self.activation = activation
        no_parameters(self, "w1", "w2", "b1", "b2")


class Mlp(TwoMatrices):
    """Of any hidden width, so that part of it works too."""

    def forward(self, n_TD: Tensor, *, later: Later | None = None) -> Tensor:
        """[T, D], without the output's bias."""
        return mlp(n_TD, self.w1, self.w2, self.b1, activation=self.activation, later=later)


class DenseMlp(BlockFunctions):
    def __init__(self, block: Block, layer: Any):
        layer.mlp_norm = Norm(block.model.norm_eps)
        layer.mlp = Mlp(activation_of(block.model))
        super().__init__(block, layer)

    def mlp(self, h_TD: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self._residual(h_TD, self.holder.mlp(self.holder.mlp_norm(h_TD), later=later), batch, ALL)

    def mlp_norm(self, h_TD: Tensor) -> Tensor:
        return self.holder.mlp_norm(h_TD)

    def mlp_hidden(self, n_TD: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self.holder.mlp(n_TD, later=later)

    def mlp_residual(self, h_TD: Tensor, added_TD: Tensor, batch: Batch) -> Tensor:
        return self._residual(h_TD, added_TD, batch, self.share.held(batch))

    def _residual(self, h_TD: Tensor, added_TD: Tensor, batch: Batch, own: slice) -> Tensor:
        return self.holder.residual(h_TD, added_TD, self.holder.mlp.b2, "mlp", batch, own)
