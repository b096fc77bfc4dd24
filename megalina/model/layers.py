"""One layer of the model: attention and a dense MLP or a mixture of experts, in the pieces of which instructions are made.

One device: `attention`, then `mlp` or (`route`, `experts`, `mix`).  Where tensor parallelism cuts a layer, the pieces
in between (`normed`, `heads`, `attention_residual`, ...) are instructions of their own.

Shapes: B sequences, S tokens a sequence, T = B x S tokens (or this rank's share of them), D model width, H query heads,
G key-value heads, d numbers a head, N routed rows, E experts, K experts a token.
"""

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.config import ModelConfig, RouterConfig
from megalina.model.attend import attend
from megalina.model.experts import Later, expert_mlp, mlp
from megalina.model.init import parameter
from megalina.model.linear import linear, linears
from megalina.model.noise import dropout
from megalina.model.norm import layer_norm, rms_norm
from megalina.model.permute import RowOrder, permute, row_order, unpermute
from megalina.model.rope import rotate
from megalina.model.routers import GroupSoFar, Router, RouterTokens, Routing
from megalina.parameters import is_moe_layer

ALL = slice(None)  # of the tokens of a micro-batch: all are this rank's


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; statistics in at least float32."""

    def __init__(self, kind: str, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = parameter(width, std=None)
        self.bias = parameter(width, std=0.0) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class Rotary(nn.Module):
    """The table of RoPE, shared by all layers; cast to the type of the queries."""

    cos_Pi: Tensor
    sin_Pi: Tensor

    def __init__(self, cos_Pi: Tensor, sin_Pi: Tensor):
        super().__init__()
        self.register_buffer("cos_Pi", cos_Pi, persistent=False)
        self.register_buffer("sin_Pi", sin_Pi, persistent=False)

    def rows(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin at each position, [B, S, d/2]."""
        return self.cos_Pi[batch.position_BS].to(dtype), self.sin_Pi[batch.position_BS].to(dtype)


class Attention(nn.Module):
    """Grouped-query attention.  The number of heads follows from the weights, so that part of the heads works too."""

    def __init__(self, config: ModelConfig, rotary: Rotary | None):
        super().__init__()
        width, out_std = config.d_model, config.init_std / (2 * config.num_layers) ** 0.5
        self.head_dim = head_dim(config)
        self.rotary = [rotary]  # in a list: shared, not a part of each layer
        self.q = parameter(config.num_heads * self.head_dim, width, std=config.init_std, sharded={"tp": 0})
        self.k = parameter(config.num_kv_heads * self.head_dim, width, std=config.init_std, sharded={"tp": 0})
        self.v = parameter(config.num_kv_heads * self.head_dim, width, std=config.init_std, sharded={"tp": 0})
        self.proj = parameter(width, config.num_heads * self.head_dim, std=out_std, sharded={"tp": 1})
        self.q_bias = parameter(config.num_heads * self.head_dim, std=0.0, sharded={"tp": 0}) if config.bias else None
        self.k_bias = parameter(config.num_kv_heads * self.head_dim, std=0.0, sharded={"tp": 0}) if config.bias else None
        self.v_bias = parameter(config.num_kv_heads * self.head_dim, std=0.0, sharded={"tp": 0}) if config.bias else None
        self.proj_bias = parameter(width, std=0.0) if config.bias else None  # added once, after the sum over tp
        self.q_norm = Norm("rmsnorm", self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm("rmsnorm", self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, n_TD: Tensor, batch: Batch, past: "KeyValues | None" = None) -> Tensor:
        """What these heads add, [T, D], without the output's bias."""
        shape = (*batch.tokens_BS.shape, -1, self.head_dim)
        biases = (self.q_bias, self.k_bias, self.v_bias)
        q_BSHd, k_BSGd, v_BSGd = (y.view(shape) for y in linears(n_TD, (self.q, self.k, self.v), biases))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSGd = self.q_norm(q_BSHd), self.k_norm(k_BSGd)
        if (rotary := self.rotary[0]) is not None:
            cos_BSi, sin_BSi = batch.once(rotary.rows, q_BSHd.dtype)
            q_BSHd, k_BSGd = rotate(q_BSHd, cos_BSi, sin_BSi), rotate(k_BSGd, cos_BSi, sin_BSi)
        if past is not None:
            k_BSGd, v_BSGd = past.extended(k_BSGd, v_BSGd)
        mixed_BSD = attend(q_BSHd, k_BSGd, v_BSGd, batch.document_BS)
        return linear(mixed_BSD.reshape(n_TD.shape[0], -1), self.proj)


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


class Mlp(nn.Module):
    """A dense MLP of hidden width F; tp cuts F where `cut` says so."""

    def __init__(self, config: ModelConfig, d_ff: int, *, cut: bool):
        super().__init__()
        self.activation = config.activation
        fused = 2 if config.activation == "swiglu" else 1  # gate and up in one matrix
        sharded = {"tp": 1} if cut else {}
        out_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.w1 = parameter(fused, d_ff, config.d_model, std=config.init_std, dims=2, sharded=sharded)
        self.w2 = parameter(config.d_model, d_ff, std=out_std, sharded=sharded)
        self.b1 = parameter(fused, d_ff, std=0.0, decay=False, dims=1, sharded=sharded) if config.bias else None
        self.b2 = parameter(config.d_model, std=0.0) if config.bias else None

    def forward(self, n_TD: Tensor) -> Tensor:
        """[T, D], without the output's bias."""
        return mlp(n_TD, self.w1, self.w2, self.b1, activation=self.activation)


class Experts(nn.Module):
    """The routed experts that this device holds."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        fused = 2 if config.activation == "swiglu" else 1
        num_experts, width, hidden = config.num_experts, config.d_model, config.d_ff
        self.w1 = parameter(num_experts, fused * hidden, width, std=config.init_std, sharded={"ep": 0})
        self.w2 = parameter(num_experts, width, hidden, std=config.init_std / (2 * config.num_layers) ** 0.5, sharded={"ep": 0})
        self.b1 = parameter(num_experts, fused * hidden, std=0.0, decay=False, sharded={"ep": 0}) if config.bias else None
        self.b2 = parameter(num_experts, width, std=0.0, decay=False, sharded={"ep": 0}) if config.bias else None

    def release(self) -> None:
        """Let go of all weights: the experts are computed elsewhere."""
        for name in list(self._parameters):
            del self._parameters[name]

    def forward(self, rows_ND: Tensor, count_E: list[int], later: Later | None = None) -> Tensor:
        """Rows sorted by expert, `count_E` of them each."""
        return expert_mlp(rows_ND, count_E, self.w1, self.w2, self.b1, self.b2, activation=self.activation, later=later)


class Layer(nn.Module):
    """Attention, then a dense MLP or a mixture of experts; both behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, router: RouterConfig, *, index: int, seed: int, rotary: Rotary | None):
        super().__init__()
        self.index, self.seed, self.rate, self.router_config = index, seed, config.dropout, router
        self.num_experts = config.num_experts
        self.attention_norm = Norm(config.norm, config.d_model, config.norm_eps)
        self.attention = Attention(config, rotary)
        self.mlp_norm = Norm(config.norm, config.d_model, config.norm_eps)
        self.is_moe = is_moe_layer(config, index)
        if self.is_moe:
            self.router = Router(router, d_model=config.d_model, num_experts=config.num_experts, layer=index, seed=seed)
            if self.router.weight is not None:
                self.router.weight = parameter(config.num_experts, config.d_model, std=config.init_std)
            self.experts = Experts(config)
            self.shared = Mlp(config, config.shared_d_ff, cut=False) if config.shared_d_ff else None
        else:
            self.mlp = Mlp(config, config.dense_d_ff or router.top_k * config.d_ff, cut=True)

    # attention
    def attend(self, x_TD: Tensor, batch: Batch, past: KeyValues | None = None) -> Tensor:
        return self.attention_residual(x_TD, self.attention(self.attention_norm(x_TD), batch, past), batch)

    def attention_residual(self, x_TD: Tensor, added_TD: Tensor, batch: Batch, own: slice = ALL) -> Tensor:
        return self._residual(x_TD, added_TD, self.attention.proj_bias, "attention", batch, own)

    # dense MLP
    def feed(self, h_TD: Tensor, batch: Batch) -> Tensor:
        return self.mlp_residual(h_TD, self.mlp(self.mlp_norm(h_TD)), batch)

    def mlp_residual(self, h_TD: Tensor, added_TD: Tensor, batch: Batch, own: slice = ALL) -> Tensor:
        return self._residual(h_TD, added_TD, self.mlp.b2, "mlp", batch, own)

    # mixture of experts
    def score(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The normed tokens and the router's logits."""
        n_TD = self.mlp_norm(h_TD)
        return n_TD, self.router.logits(n_TD)

    def select(
        self, n_TD: Tensor, logits_TE: Tensor, logits_AE: Tensor, batch: Batch, own: slice = ALL
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, RowOrder, Tensor]:
        """Rows for the experts in the order of experts, their weights, two losses, the order, and the load.

        `logits_AE`: of all tokens of the micro-batch, without gradient; `own`: which of them are `n_TD`.
        The first loss is the balance loss, or with `router.group=global` the sums of probabilities [E] it is made of.
        Load: int64 [E + 1], tokens that chose each expert, and choices lost to capacity.
        """
        routing: Routing = self.router(logits_TE, router_tokens(batch), logits_AE, own)
        return self._selected(n_TD, routing, routing.prob_E if self.router_config.group == "global" else routing.balance)

    def select_part(
        self, n_TD: Tensor, logits_TE: Tensor, logits_AE: Tensor, batch: Batch, own: slice, so_far: GroupSoFar
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, RowOrder, Tensor, GroupSoFar]:
        """As `select`, of a batch that is the next part of its micro-batch; then what the part after it must know.

        The first loss is the sums of probabilities [E] of which the whole micro-batch's balance loss is made.
        """
        routing: Routing = self.router(logits_TE, router_tokens(batch), logits_AE, own, so_far)
        assert routing.so_far is not None
        return *self._selected(n_TD, routing, routing.prob_E), routing.so_far

    def _selected(
        self, n_TD: Tensor, routing: Routing, balance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, RowOrder, Tensor]:
        order = row_order(routing.expert_TK, self.num_experts)
        load = torch.cat([routing.chosen_E, routing.dropped.reshape(1)])
        return permute(n_TD, order), routing.weight_TK, balance, routing.z, order, load

    def mix(
        self,
        h_TD: Tensor,
        back_ND: Tensor,
        weight_TK: Tensor,
        shared_TD: Tensor | None,
        order: RowOrder,
        batch: Batch,
        own: slice = ALL,
    ) -> Tensor:
        """The residual plus each token's experts by weight, plus the shared experts."""
        if shared_TD is None and not (self.rate and self.training):
            return unpermute(h_TD, back_ND, weight_TK, order)
        added_TD = unpermute(torch.zeros_like(h_TD) if shared_TD is None else shared_TD, back_ND, weight_TK, order)
        return self._residual(h_TD, added_TD, None, "mlp", batch, own)

    def share(self, n_TD: Tensor) -> Tensor:
        """The shared experts."""
        assert self.shared is not None
        out_TD = self.shared(n_TD)
        return out_TD if self.shared.b2 is None else out_TD + self.shared.b2

    def _residual(self, x_TD: Tensor, added_TD: Tensor, bias_D: Tensor | None, site: str, batch: Batch, own: slice) -> Tensor:
        if bias_D is not None:
            added_TD = added_TD + bias_D
        if self.rate and self.training:
            sample_T, position_T = places(batch, own)
            added_TD = dropout(added_TD, self.rate, self.seed, self.index, site, sample_T, position_T)
        return x_TD + added_TD


def head_dim(config: ModelConfig) -> int:
    return config.head_dim or config.d_model // config.num_heads


def places(batch: Batch, own: slice) -> tuple[Tensor, Tensor]:
    """Number of the sequence and index within it, of each of this rank's tokens: what noise is a function of."""
    tokens = router_tokens(batch)
    return tokens.sample_A[own], tokens.position_A[own]


def router_tokens(batch: Batch) -> RouterTokens:
    """What routers know of a micro-batch; the same object each time, so what it has found out need not be found out again."""
    return batch.once(_tokens_of)


def _tokens_of(batch: Batch) -> RouterTokens:
    batch_size, length = batch.tokens_BS.shape
    sample_A = batch.sample_B.repeat_interleave(length)
    position_A = torch.arange(length, device=sample_A.device).repeat(batch_size)
    tokens_A, valid_A = batch.tokens_BS.flatten(), batch.valid_BS.flatten()
    return RouterTokens(tokens_A, sample_A, position_A, valid_A, batch_size, batch.may_have_padding)
