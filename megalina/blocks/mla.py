"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

A token's keys and values are made of few numbers, and so, with `model.q_lora_rank`, are its queries.  Positions turn a part of
each query, and one part of the key that all heads have in common.  Of earlier tokens generation keeps those few numbers and that
part of the key alone, `numbers_kept` of them.

Under tensor parallelism heads are cut; what compresses, and its norms, every rank holds whole."""

from collections.abc import Sequence

from megalina.blocks import context, memory
from megalina.blocks.attention import Attention
from megalina.blocks.block import norm_parameters, output_std
from megalina.blocks.context import HeadSizes
from megalina.blocks.heads import attention_bias, numbers_kept, query_size
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import At, Rank
from megalina.blocks.work import Piece, Work, linear, norm
from megalina.config import ModelConfig

COMPRESSED_EPS = 1e-6  # of the norms of what is compressed, whatever model.norm_eps is: so it is in transformers


class LatentAttention(Attention):
    functions = "megalina.model.mla:LatentAttention"

    @staticmethod
    def check(model: ModelConfig) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if not getattr(model, name):
                raise ValueError(f"model.attention=mla needs model.{name}: give its size, 1 or more")
        if model.num_kv_heads != model.num_heads:
            raise ValueError(
                f"model.attention=mla gives each head its own keys and values: set model.num_kv_heads ({model.num_kv_heads}) to "
                f"model.num_heads ({model.num_heads})"
            )
        if model.positions != "rope":
            raise ValueError(f"model.attention=mla turns a part of each head: positions={model.positions} can't be; use rope")
        plain = {"head_dim": 0, "qk_norm": "none", "attention_experts": 0}
        for name, value in {**plain, "rotary_fraction": 1.0}.items():
            if (given := getattr(model, name)) != value:
                raise ValueError(f"model.attention=mla has no model.{name} ({given}): set it to {str(value).lower()}")
        if attention_bias(model) != "none":
            raise ValueError("model.attention=mla has no biases: set model.attention_bias=none")

    def parameters(self) -> Sequence[Parameter]:
        model, width, std, tp = self.model, self.model.d_model, self.model.init_std, {"tp": 0}
        heads, compressed = model.num_heads, model.q_lora_rank
        q, up = heads * query_size(model), heads * (model.qk_nope_head_dim + model.v_head_dim)
        # QK-clip: the turned part of the key is of all heads, so what it would be scaled by goes on the queries' turned part
        clip_q = (model.qk_nope_head_dim, "q"), (model.qk_rope_head_dim, "both")
        clip_kv = (model.qk_nope_head_dim, "k"), (model.v_head_dim, "none")
        out = norm_parameters("attention_norm", model)
        if compressed:
            out.append(Parameter("attention.q_down", (compressed, width), std))
            out.append(Parameter("attention.q_up", (q, compressed), std, tp, clip=clip_q))
        else:
            out.append(Parameter("attention.q", (q, width), std, tp, clip=clip_q))
        out.append(Parameter("attention.kv_down", (numbers_kept(model), width), std))
        # of each head the key's, then the value's
        out.append(Parameter("attention.kv_up", (up, model.kv_lora_rank), std, tp, clip=clip_kv))
        out.append(Parameter("attention.proj", (width, heads * model.v_head_dim), output_std(model), {"tp": 1}))
        if model.attention_sinks:
            out.append(Parameter("attention.sinks", (model.num_heads,), std, tp))
        if compressed:
            out.append(Parameter("attention.q_norm.weight", (compressed,), None))
        out.append(Parameter("attention.kv_norm.weight", (model.kv_lora_rank,), None))
        return out

    def heads_work(self, at: At) -> Piece:
        rank, model, d, tokens = at.rank, self.model, self.model.d_model, at.tokens
        heads, size, value = model.num_heads / rank.tp, query_size(model), model.v_head_dim
        compressed, latent, turned = model.q_lora_rank, model.kv_lora_rank, model.qk_rope_head_dim
        out = linear(rank, tokens, compressed or heads * size, d)
        if compressed:
            out += norm(rank, tokens, compressed) + linear(rank, tokens, heads * size, compressed)
        out += linear(rank, tokens, latent + turned, d) + norm(rank, tokens, latent)
        out += linear(rank, tokens, heads * (model.qk_nope_head_dim + value), latent)
        out += self.rotation_work(at, (heads + 1) * turned, heads * model.qk_nope_head_dim)
        keys_bytes = 2 * tokens * heads * size * rank.element  # both parts, side by side
        out += Piece(Work((), keys_bytes, 2), Work((), 2 * keys_bytes, 4))
        out += linear(rank, tokens, d, heads * value)
        if optimizer_of(rank.config.optim).clips_heads:
            out += self.logits_work(at, size, 2 * heads * size)
        return out + self.core_work(at, size, value, 2 * heads * (size + value))

    def heads_memory(self, at: At, *, whole: bool) -> Inside:
        rank, model, t, heads = at.rank, self.model, int(at.tokens), self.heads_here(at)
        token = t * rank.element
        x, compressed, latent = token * rank.width, token * model.q_lora_rank, token * model.kv_lora_rank
        size = query_size(model)
        q, v = token * heads * size, token * heads * model.v_head_dim
        up = token * heads * (model.qk_nope_head_dim + model.v_head_dim)
        before, after = memory.Inside(), memory.Inside()
        if whole:
            before, after = memory.norm(rank, t), memory.residual(rank, t, bias=False)
        block, weights = self.scores(at)
        laid_out = (2 * q + v) * self.is_blocked(rank)  # queries, keys and values once more, head by head
        normed = before.kept + x * whole
        down = 2 * compressed + token * numbers_kept(model) + latent + (1 + bool(compressed)) * t * rank.main
        even = v == q or rank.cuda or self.is_blocked(rank)
        # where the kernel has one width for all, what is narrower has a wide copy
        read, gives = (2 * q + up, v) if even else (3 * q, q + v) if v < q else (2 * v + up, v)
        kept = normed + down + read + gives + weights
        forward = max(
            before.forward + before.kept,
            normed + down + 2 * q,
            normed + down + 2 * q + up + self.logits_memory(at, size),
            kept + block + laid_out,
            kept + x + after.forward,
        )
        tail = x + before.backward - kept if whole else 0
        inner = v if weights > t * heads * rank.main else 0
        gradients = 2 * q + 2 * v if even else 4 * max(q, v)
        down_outer = memory.outer(rank, rank.width, max(heads * model.v_head_dim, model.q_lora_rank))
        backward = max(gradients + max(inner, 2 * block + v + laid_out), v + down_outer, tail)
        return Inside(kept + after.kept, forward, backward)

    def deferred(self, at: At) -> Deferred:
        """The products' inputs and the gradients of what they gave."""
        if at.name in context.NAMES:
            return context.deferred(self, at)
        rank, model, t, whole = at.rank, self.model, int(at.tokens), at.rank.tp == 1
        heads = self.heads_here(at)
        q, v = heads * query_size(model), heads * model.v_head_dim
        numbers = rank.width * whole + q + 2 * model.q_lora_rank + numbers_kept(model) + model.kv_lora_rank
        numbers += heads * (model.qk_nope_head_dim + model.v_head_dim) + v
        return Deferred(t * numbers * rank.element, reads=not whole, gradients=True, rise=memory.outer(rank, rank.width, v))

    # with context parallelism
    def head_sizes(self, rank: Rank) -> HeadSizes:
        heads = self.model.num_heads // rank.tp
        return HeadSizes(heads, heads, query_size(self.model), self.model.v_head_dim, numbers_kept(self.model))

    def queries_work(self, at: At) -> Piece:
        rank, model, d, tokens = at.rank, self.model, at.rank.width, at.tokens
        heads, size, compressed = model.num_heads / rank.tp, query_size(model), model.q_lora_rank
        out = linear(rank, tokens, compressed or heads * size, d)
        if compressed:
            out += norm(rank, tokens, compressed) + linear(rank, tokens, heads * size, compressed)
        return out + self.rotation_work(at, heads * model.qk_rope_head_dim, heads * model.qk_nope_head_dim)

    def keys_work(self, at: At) -> Piece:
        rank, model, tokens = at.rank, self.model, at.tokens
        joined = Work((), 2 * tokens * numbers_kept(model) * rank.element, 1)
        out = linear(rank, tokens, numbers_kept(model), rank.width) + norm(rank, tokens, model.kv_lora_rank)
        return out + self.rotation_work(at, model.qk_rope_head_dim, 0) + Piece(joined, joined)

    def making_work(self, at: At, tokens: float) -> Piece:
        rank, model = at.rank, self.model
        heads = model.num_heads / rank.tp
        keys_bytes = 2 * tokens * heads * query_size(model) * rank.element  # both parts, side by side
        joined = Piece(Work((), keys_bytes, 2), Work((), 2 * keys_bytes, 4))
        return linear(rank, tokens, heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank) + joined

    def out_work(self, at: At) -> Piece:
        return linear(at.rank, at.tokens, at.rank.width, self.model.num_heads / at.rank.tp * self.model.v_head_dim)

    def queries_memory(self, at: At) -> Inside:
        rank, t = at.rank, int(at.tokens)
        compressed = t * self.model.q_lora_rank * rank.element
        q = t * self.heads_here(at) * query_size(self.model) * rank.element
        kept = 2 * compressed + t * rank.main * bool(compressed)
        return Inside(kept, kept + 2 * q, 2 * q + 2 * compressed)

    def keys_memory(self, at: At) -> Inside:
        rank, t = at.rank, int(at.tokens)
        down = t * numbers_kept(self.model) * rank.element
        kept = down + t * rank.main
        return Inside(kept, kept + 2 * down, 3 * down)

    def made_bytes(self, rank: Rank, tokens: int) -> int:
        """Keys, both parts side by side, and what values are parts of."""
        model, heads = self.model, self.model.num_heads // rank.tp
        numbers = query_size(model) + model.qk_nope_head_dim + model.v_head_dim
        return tokens * heads * numbers * rank.element
