"""Attention in torch: its weights, its functions, and the keys and values that generation keeps.

Shapes: B sequences, S tokens a sequence, T = B x S tokens (or this rank's share of them), D model width, H query heads,
G key-value heads, d numbers a head, X = H x d, Y = G x d, N experts of a mixture of attention heads.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.block import Block
from megalina.blocks.heads import head_dim, tokens_of_room, tokens_seen
from megalina.config import ModelConfig
from megalina.model.attend import attend
from megalina.model.block_functions import BlockFunctions, Seen, no_parameters
from megalina.model.context_attention import attend_gathered, attend_with_heads, joined_heads, spread_heads
from megalina.model.largest_logits import largest_logits
from megalina.model.late_gradients import Later
from megalina.model.linear import linear, linears, wide_linear
from megalina.model.norm import Norm, rms_norm_by, row_squares
from megalina.model.rope import Rotary, rotate
from megalina.model.tokens import ALL
from megalina.step.program import Instruction
from megalina.zigzag import pieces_of


class Heads(nn.Module):
    """Grouped-query attention.  The number of heads follows from the weights, so that part of the heads works too."""

    q: Tensor
    k: Tensor
    v: Tensor
    proj: Tensor
    router: Tensor | None  # [N, D] of a mixture of attention heads; all tensor-parallel ranks hold it whole
    sinks: Tensor | None  # [H]
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    proj_bias: Tensor | None

    def __init__(self, model: ModelConfig, rotary: Rotary | None, *, rank: int):
        """`model`: of this layer; `rank`: which of the tensor-parallel ranks this is."""
        super().__init__()
        self.head_dim, self.num_heads, self.num_kv_heads, self.rank = head_dim(model), model.num_heads, model.num_kv_heads, rank
        self.window, self.normed, self.scale = model.window, model.qk_norm, None
        self.rotary = [rotary]  # in a list: shared, not a part of each layer
        no_parameters(self, "q", "k", "v", "proj", "router", "sinks", "q_bias", "k_bias", "v_bias", "proj_bias")
        self.q_norm = Norm(model.norm_eps) if model.qk_norm != "none" else None
        self.k_norm = Norm(model.norm_eps) if model.qk_norm != "none" else None

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
        q_TX, k_TY, v_TY = self.projected(n_TD, later=later)
        if self.normed == "projection" and self.q_norm is not None and self.k_norm is not None:
            q_TX, k_TY = self.q_norm(q_TX), self.k_norm(k_TY)
        mixed_TX = self.mixed(q_TX, k_TY, v_TY, batch, past, logits)
        if self.router is not None:
            mixed_TX = self._scaled(mixed_TX, n_TD, later)
        return linear(mixed_TX, self.proj, later=later)

    def projected(self, n_TD: Tensor, *, later: Later | None = None) -> tuple[Tensor, ...]:
        """Queries, keys and values, [T, X] and twice [T, Y]."""
        return linears(n_TD, (self.q, self.k, self.v), (self.q_bias, self.k_bias, self.v_bias), later=later)

    def squares(self, q_TX: Tensor, k_TY: Tensor) -> Tensor:
        """Of the norm of all heads together: this rank's part of the sum of a token's squares, queries' and keys', [T, 2]."""
        return torch.stack([row_squares(q_TX), row_squares(k_TY)], dim=1)

    def core(
        self, q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, square_T2: Tensor, batch: Batch, *, later: Later | None = None
    ) -> Tensor:
        """What `forward` gives of `projected`, with the squares of all ranks."""
        q_TX, k_TY = self.normed_by(q_TX, k_TY, square_T2)
        return linear(self.mixed(q_TX, k_TY, v_TY, batch, None), self.proj, later=later)

    def mixed(
        self,
        q_TX: Tensor,
        k_TY: Tensor,
        v_TY: Tensor,
        batch: Batch,
        past: "KeyValues | None",
        logits: list[Tensor] | None = None,
    ) -> Tensor:
        """What the heads give, [T, X]."""
        shape = (*batch.tokens_BS.shape, -1, self.head_dim)
        q_BSHd, k_BSGd, v_BSGd = q_TX.view(shape), k_TY.view(shape), v_TY.view(shape)
        if self.normed == "head" and self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSGd = self.q_norm(q_BSHd), self.k_norm(k_BSGd)
        if (rotary := self.rotary[0]) is not None:
            cos_BSi, sin_BSi = batch.once(rotary.rows, q_BSHd.dtype)
            q_BSHd, k_BSGd = rotate(q_BSHd, cos_BSi, sin_BSi), rotate(k_BSGd, cos_BSi, sin_BSi)
        document_BL = batch.document_BS
        if past is not None:
            k_BSGd, v_BSGd = past.extended(k_BSGd, v_BSGd)
            document_BL = None if document_BL is None else document_BL[:, document_BL.shape[1] - k_BSGd.shape[1] :]
        if logits is not None:
            logits.append(largest_logits(q_BSHd, k_BSGd, document_BL, window=self.window))
        mixed_BSX = attend(q_BSHd, k_BSGd, v_BSGd, document_BL, window=self.window, sink_H=self.sinks)
        return mixed_BSX.reshape(q_TX.shape)

    # with context parallelism
    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Query heads and key heads here, numbers of a query and of a value."""
        return len(self.q) // self.head_dim, len(self.k) // self.head_dim, self.head_dim, self.head_dim

    def queries(self, n_TD: Tensor, batch: Batch, later: Later | None) -> Tensor:
        q_TX = linear(n_TD, self.q, self.q_bias, later=later)
        return self._turned(q_TX, self.q_norm, batch)

    def compact_keys(self, n_TD: Tensor, batch: Batch, later: Later | None) -> Tensor:
        k_TY, v_TY = linears(n_TD, (self.k, self.v), (self.k_bias, self.v_bias), later=later)
        return torch.cat([self._turned(k_TY, self.k_norm, batch).flatten(2), v_TY.view(*batch.tokens_BS.shape, -1)], dim=2)

    def keys_and_values(self, kv_BLy: Tensor, later: Later | None) -> tuple[Tensor, Tensor]:
        k_BLY, v_BLY = kv_BLy.chunk(2, dim=2)
        return k_BLY.unflatten(2, (-1, self.head_dim)), v_BLY.unflatten(2, (-1, self.head_dim))

    def out(self, mixed_TX: Tensor, n_TD: Tensor | None, later: Later | None) -> Tensor:
        """What these heads add, from what they give; `n_TD` where they are experts."""
        return linear(mixed_TX if n_TD is None else self._scaled(mixed_TX, n_TD, later), self.proj, later=later)

    def normed_by(self, q_TX: Tensor, k_TY: Tensor, square_T2: Tensor) -> tuple[Tensor, Tensor]:
        """Of the norm of all heads together, with the squares of all ranks."""
        assert self.q_norm is not None and self.k_norm is not None
        q_T, k_T = square_T2.unbind(1)
        q_TX = rms_norm_by(q_TX, q_T, self.num_heads * self.head_dim, self.q_norm.weight, self.q_norm.eps)
        return q_TX, rms_norm_by(k_TY, k_T, self.num_kv_heads * self.head_dim, self.k_norm.weight, self.k_norm.eps)

    def placed(self, q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, square_T2: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `queries` and `compact_keys`, of `projected`, with the squares of all ranks."""
        q_TX, k_TY = self.normed_by(q_TX, k_TY, square_T2)
        k_BSGd = self._turned(k_TY, None, batch)
        return self._turned(q_TX, None, batch), torch.cat([k_BSGd.flatten(2), v_TY.view(*batch.tokens_BS.shape, -1)], dim=2)

    def _turned(self, x_TY: Tensor, norm: Norm | None, batch: Batch) -> Tensor:
        """[B, S, heads, d]: queries or keys, normed, by their positions."""
        x_TY = norm(x_TY) if norm is not None and self.normed == "projection" else x_TY
        x_BSHd = x_TY.view(*batch.tokens_BS.shape, -1, self.head_dim)
        x_BSHd = norm(x_BSHd) if norm is not None and self.normed == "head" else x_BSHd
        rotary = self.rotary[0]
        return x_BSHd if rotary is None else rotate(x_BSHd, *batch.once(rotary.rows, x_BSHd.dtype))

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
    """What generation keeps of one layer's tokens so far: keys and values, or fewer tensors that they are made of.

    Room for C tokens is taken once, for `capacity` if that is known; twice as much whenever it is too little.  With a `window`
    it is at most for what the next token sees and a quarter of the window (`tokens_of_room`): once it is full, what can still be
    seen moves into other room."""

    def __init__(self, capacity: int = 0, window: int = 0):
        self.length = 0  # tokens so far
        self._capacity, self._window = capacity, window
        self._room: tuple[Tensor, ...] = ()  # each [B, C, ...]
        self._end = 0  # so many places of it are taken, by the last tokens

    @property
    def numbers(self) -> int:
        """That are kept of a token."""
        return sum(room[0, 0].numel() for room in self._room)

    @property
    def room(self) -> int:
        """Tokens."""
        return self._room[0].shape[1] if self._room else 0

    def extended(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Of each tensor [B, S, ...] what the first of these tokens sees of those so far, with these behind, [B, L, ...]; the
        next call leaves it as it is."""
        seen, count = tokens_seen(self._window, self.length), new[0].shape[1]
        self.length += count
        if self._end + count > self.room:
            self._move(new, seen)
        if self._end + count > self.room:
            return self._passed(new, seen)
        begin, self._end = self._end, self._end + count
        for room, x in zip(self._room, new, strict=True):
            room[:, begin : self._end] = x
        return tuple(room[:, begin - seen : self._end] for room in self._room)

    def _move(self, new: tuple[Tensor, ...], seen: int) -> None:
        """Into other room, with what is still seen."""
        old, begin, before = self._room, self._end - seen, self.length - new[0].shape[1]
        self._capacity = max(self._capacity, self.length, 2 * before)
        tokens = tokens_of_room(self._window, self._capacity)
        self._room, self._end = tuple(x.new_empty(x.shape[0], tokens, *x.shape[2:]) for x in new), seen
        for room, x in zip(self._room, old, strict=False):  # at first there is no old one
            room[:, :seen] = x[:, begin : begin + seen]

    def _passed(self, new: tuple[Tensor, ...], seen: int) -> tuple[Tensor, ...]:
        """More tokens at once than a window has room for, as those of a long prompt: all are read, and the last ones kept."""
        out = tuple(torch.cat([room[:, :seen], x], 1) if seen else x for room, x in zip(self._room, new, strict=True))
        self._end = tokens_seen(self._window, self.length)
        for room, x in zip(self._room, out, strict=True):
            room[:, : self._end] = x[:, x.shape[1] - self._end :]
        return out


class Attention(BlockFunctions):
    """Any attention; a kind of it says what its heads are."""

    def __init__(self, block: Block, layer: Any):
        layer.attention_norm = Norm(block.model.norm_eps)
        layer.attention = self.heads(block.model, layer)
        super().__init__(block, layer)

    @abstractmethod
    def heads(self, model: ModelConfig, layer: Any) -> nn.Module:
        """A module that gives [T, D] of `(n_TD, batch, past, later=)`, and has a `proj_bias`."""

    def bind(self, instruction: Instruction, later: Later | None) -> Callable[..., Any]:
        function = super().bind(instruction, later)
        if not any(value.startswith("#logit.") for value in instruction.writes):
            return function

        def told(*values: Any) -> tuple[Tensor, Tensor]:
            logits: list[Tensor] = []
            out = function(*values, logits=logits)
            return out, torch.stack(logits).amax(0)

        return told

    def attention(self, x_TD: Tensor, batch: Batch, past: KeyValues | None = None, **asked: Any) -> Tensor:
        """`asked`: what its heads take besides, `later` and, of heads that tell them, `logits`."""
        heads_TD = self.holder.attention(self.holder.attention_norm(x_TD), batch, past, **asked)
        return self._residual(x_TD, heads_TD, batch, ALL)

    def attention_norm(self, x_TD: Tensor) -> Tensor:
        return self.holder.attention_norm(x_TD)

    def attention_heads(self, n_TD: Tensor, batch: Batch, **asked: Any) -> Tensor:
        return self.holder.attention(n_TD, batch, **asked)

    def attention_residual(self, x_TD: Tensor, added_TD: Tensor, batch: Batch) -> Tensor:
        return self._residual(x_TD, added_TD, batch, self.share.held(batch))

    # with context parallelism
    def attention_keys(self, x_TD: Tensor, batch: Batch, *, later: Later | None = None) -> tuple[Tensor, ...]:
        """What keys and values are made of; without tensor parallelism the normed stream before it."""
        n_TD, normed = self._normed(x_TD)
        kv_BSy = self.holder.attention.compact_keys(n_TD, batch, later)
        return *normed, kv_BSy.flatten(0, 1)

    def attention_queries(self, n_TD: Tensor, batch: Batch, *, later: Later | None = None) -> Tensor:
        return self.holder.attention.queries(n_TD, batch, later).flatten(2).flatten(0, 1)

    def attention_gathered(
        self, q_TX: Tensor, kv_Ny: Tensor, *rest: Any, later: Later | None = None, logits: list[Tensor] | None = None
    ) -> Tensor:
        batch, heads = rest[-1], self.holder.attention
        mixed_TX = attend_gathered(heads, q_TX, kv_Ny, batch, self.piece_ends(batch), later=later, logits=logits)
        return self._added(mixed_TX, *rest, later=later)

    def piece_ends(self, batch: Batch) -> list[int]:
        """Where in their sequences this rank's pieces end: its queries see the keys up to their own."""
        piece = batch.tokens_BS.shape[1] // 2
        return [(number + 1) * piece for number in pieces_of(batch.contexts, batch.context)]

    def attention_spread(self, x_TD: Tensor, batch: Batch, *, later: Later | None = None) -> tuple[Tensor, ...]:
        """For each rank its heads of this one's tokens; where heads are experts the normed stream before it."""
        n_TD, normed = self._normed(x_TD)
        heads = self.holder.attention
        queries, keys = heads.queries(n_TD, batch, later), heads.compact_keys(n_TD, batch, later)
        spread = spread_heads(heads, queries, keys, batch.contexts, later=later)
        return (*normed, spread) if self.block.model.attention_experts else (spread,)

    def attention_of_heads(self, qkv_Nx: Tensor, batch: Batch, *, logits: list[Tensor] | None = None) -> Tensor:
        heads = self.holder.attention
        return attend_with_heads(heads, heads.sizes, qkv_Nx, batch, logits=logits)

    def attention_joined(self, mixed_Nx: Tensor, *rest: Any, later: Later | None = None) -> Tensor:
        return self._added(joined_heads(mixed_Nx, self.share.contexts), *rest, later=later)

    def _normed(self, x_TD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The normed stream, and what of it the list does not have yet."""
        if self.share.ranks > 1:
            return x_TD, ()
        n_TD = self.holder.attention_norm(x_TD)
        return n_TD, (n_TD,)

    def _added(self, mixed_TX: Tensor, *rest: Any, later: Later | None) -> Tensor:
        """What these heads add, without tensor parallelism to the stream.  `rest`: the normed stream where heads are experts, the
        stream, the batch."""
        *values, batch = rest
        n_TD = values.pop(0) if self.block.model.attention_experts else None
        added_TD: Tensor = self.holder.attention.out(mixed_TX, n_TD, later)
        return self._residual(values[0], added_TD, batch, ALL) if values else added_TD

    def forward(self, x_TD: Tensor, batch: Batch, seen: Seen, past: KeyValues | None = None) -> Tensor:
        return self.attention(x_TD, batch, past)

    def _residual(self, x_TD: Tensor, added_TD: Tensor, batch: Batch, own: slice) -> Tensor:
        return self.holder.residual(x_TD, added_TD, self.holder.attention.proj_bias, "attention", batch, own)


class GroupedQueryAttention(Attention):
    def heads(self, model: ModelConfig, layer: Any) -> Heads:
        return Heads(model, layer.rotary[0], rank=layer.share.rank)

    def attention_qkv(self, n_TD: Tensor, *, later: Later | None = None) -> tuple[Tensor, ...]:
        """Queries, keys, values, and this rank's squares of the first two."""
        q_TX, k_TY, v_TY = self.holder.attention.projected(n_TD, later=later)
        return q_TX, k_TY, v_TY, self.holder.attention.squares(q_TX, k_TY)

    def attention_turned(self, *values: Any) -> tuple[Tensor, Tensor]:
        """With context parallelism: queries, and what keys and values are made of, from `attention_qkv` and all squares."""
        q_BSHd, kv_BSy = self.holder.attention.placed(*values)
        return q_BSHd.flatten(2).flatten(0, 1), kv_BSy.flatten(0, 1)

    def attention_turned_heads(self, *values: Any) -> Tensor:
        """The same for each rank, its heads."""
        heads = self.holder.attention
        q_BSHd, kv_BSy = heads.placed(*values)
        return spread_heads(heads, q_BSHd, kv_BSy, self.share.contexts, later=None)

    def attention_core(
        self, q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, square_T2: Tensor, batch: Batch, *, later: Later | None = None
    ) -> Tensor:
        return self.holder.attention.core(q_TX, k_TY, v_TY, square_T2, batch, later=later)
