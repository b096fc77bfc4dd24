"""Attention in torch: its weights, its functions, and the keys and values that generation keeps.

Shapes: B sequences, S tokens a sequence, T = B x S tokens (or this rank's share of them), D model width, H query heads,
G key-value heads, d numbers a head, N experts of a mixture of attention heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.attention import head_dim
from megalina.blocks.block import Block
from megalina.model.attend import attend
from megalina.model.block_functions import BlockFunctions, Seen, no_parameters
from megalina.model.largest_logits import largest_logits
from megalina.model.late_gradients import Later
from megalina.model.linear import linear, linears, wide_linear
from megalina.model.norm import Norm
from megalina.model.rope import Rotary, rotate
from megalina.model.tokens import ALL
from megalina.step.program import Instruction


class Heads(nn.Module):
    """Grouped-query attention.  The number of heads follows from the weights, so that part of the heads works too."""

    q: Tensor
    k: Tensor
    v: Tensor
    proj: Tensor
    router: Tensor | None  # [N, D] of a mixture of attention heads; all tensor-parallel ranks hold it whole
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    proj_bias: Tensor | None

    def __init__(self, head_dim: int, eps: float, rotary: Rotary | None, *, qk_norm: bool, num_heads: int, rank: int):
        """`num_heads`: of all tensor-parallel ranks; `rank`: which of them this is."""
        super().__init__()
        self.head_dim, self.num_heads, self.rank = head_dim, num_heads, rank
        self.rotary = [rotary]  # in a list: shared, not a part of each layer
        no_parameters(self, "q", "k", "v", "proj", "router", "q_bias", "k_bias", "v_bias", "proj_bias")
        self.q_norm = Norm(eps) if qk_norm else None
        self.k_norm = Norm(eps) if qk_norm else None

    def forward(
        self,
        n_TD: Tensor,
        batch: Batch,
        past: "KeyValues | None" = None,
        *,
        later: Later | None = None,
        logits: list[Tensor] | None = None,
    ) -> Tensor:
        """What these heads add, [T, D], without the output's bias.  `logits` gets the largest of each group of heads, [G]."""
        shape = (*batch.tokens_BS.shape, -1, self.head_dim)
        biases = (self.q_bias, self.k_bias, self.v_bias)
        q_BSHd, k_BSGd, v_BSGd = (y.view(shape) for y in linears(n_TD, (self.q, self.k, self.v), biases, later=later))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSGd = self.q_norm(q_BSHd), self.k_norm(k_BSGd)
        if (rotary := self.rotary[0]) is not None:
            cos_BSi, sin_BSi = batch.once(rotary.rows, q_BSHd.dtype)
            q_BSHd, k_BSGd = rotate(q_BSHd, cos_BSi, sin_BSi), rotate(k_BSGd, cos_BSi, sin_BSi)
        if past is not None:
            k_BSGd, v_BSGd = past.extended(k_BSGd, v_BSGd)
        if logits is not None:
            logits.append(largest_logits(q_BSHd, k_BSGd, batch.document_BS))
        mixed_BSD = attend(q_BSHd, k_BSGd, v_BSGd, batch.document_BS)
        mixed_TX = mixed_BSD.reshape(n_TD.shape[0], -1)  # X = H x d
        if self.router is not None:
            mixed_TX = self._scaled(mixed_TX, n_TD, later)
        return linear(mixed_TX, self.proj, later=later)

    def _scaled(self, mixed_TX: Tensor, n_TD: Tensor, later: Later | None) -> Tensor:
        """What each head gives, times the probability of its expert; the probabilities are at least float32, and are then of the
        heads' type.  Scaled here, each expert's output is scaled: the projection is linear."""
        assert self.router is not None
        prob_TN = wide_linear(n_TD, self.router, later=later).softmax(dim=1).to(mixed_TX.dtype)
        heads = mixed_TX.shape[1] // self.head_dim
        head_H = torch.arange(self.rank * heads, (self.rank + 1) * heads, device=mixed_TX.device)
        prob_TH = prob_TN.index_select(1, head_H * len(self.router) // self.num_heads)
        return (mixed_TX.view(-1, heads, self.head_dim) * prob_TH.unsqueeze(2)).flatten(1)


class KeyValues:
    """The keys and values of one layer's tokens so far, for generation.

    Room for C tokens is taken once, for `capacity` if that is known; twice as much whenever it is too little."""

    def __init__(self, capacity: int = 0):
        self.length = 0  # tokens so far
        self._capacity = capacity
        self._room: tuple[Tensor, Tensor] | None = None  # keys and values, [B, C, G, d]

    def extended(self, k_BSGd: Tensor, v_BSGd: Tensor) -> tuple[Tensor, Tensor]:
        """All so far, with these behind, [B, L, G, d]: views that the next call leaves as they are."""
        before, self.length = self.length, self.length + k_BSGd.shape[1]
        if self._room is None or self.length > self._room[0].shape[1]:
            self._grow(k_BSGd, v_BSGd, before)
        assert self._room is not None
        for room_BCGd, new_BSGd in zip(self._room, (k_BSGd, v_BSGd), strict=True):
            room_BCGd[:, before : self.length] = new_BSGd
        k_BCGd, v_BCGd = self._room
        return k_BCGd[:, : self.length], v_BCGd[:, : self.length]

    def _grow(self, k_BSGd: Tensor, v_BSGd: Tensor, before: int) -> None:
        old, self._capacity = self._room, max(self._capacity, self.length, 2 * before)
        keys, values = (x.new_empty(x.shape[0], self._capacity, *x.shape[2:]) for x in (k_BSGd, v_BSGd))
        if old is not None:
            keys[:, :before], values[:, :before] = (x[:, :before] for x in old)
        self._room = keys, values


class Attention(BlockFunctions):
    def __init__(self, block: Block, layer: Any):
        model = block.model
        layer.attention_norm = Norm(model.norm_eps)
        layer.attention = Heads(
            head_dim(model),
            model.norm_eps,
            layer.rotary[0],
            qk_norm=model.qk_norm,
            num_heads=model.num_heads,
            rank=layer.share.rank,
        )
        super().__init__(block, layer)

    def bind(self, instruction: Instruction, later: Later | None) -> Callable[..., Any]:
        function = super().bind(instruction, later)
        if not any(value.startswith("#logit.") for value in instruction.writes):
            return function

        def told(*values: Any) -> tuple[Tensor, Tensor]:
            logits: list[Tensor] = []
            out = function(*values, logits=logits)
            return out, logits[0]

        return told

    def attention(
        self,
        x_TD: Tensor,
        batch: Batch,
        past: KeyValues | None = None,
        *,
        later: Later | None = None,
        logits: list[Tensor] | None = None,
    ) -> Tensor:
        heads_TD = self.holder.attention(self.holder.attention_norm(x_TD), batch, past, later=later, logits=logits)
        return self._residual(x_TD, heads_TD, batch, ALL)

    def attention_norm(self, x_TD: Tensor) -> Tensor:
        return self.holder.attention_norm(x_TD)

    def attention_heads(
        self, n_TD: Tensor, batch: Batch, *, later: Later | None = None, logits: list[Tensor] | None = None
    ) -> Tensor:
        return self.holder.attention(n_TD, batch, later=later, logits=logits)

    def attention_residual(self, x_TD: Tensor, added_TD: Tensor, batch: Batch) -> Tensor:
        return self._residual(x_TD, added_TD, batch, self.share.held(batch))

    def forward(self, x_TD: Tensor, batch: Batch, seen: Seen, past: KeyValues | None = None) -> Tensor:
        return self.attention(x_TD, batch, past)

    def _residual(self, x_TD: Tensor, added_TD: Tensor, batch: Batch, own: slice) -> Tensor:
        return self.holder.residual(x_TD, added_TD, self.holder.attention.proj_bias, "attention", batch, own)
