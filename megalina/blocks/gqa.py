"""Grouped-query attention: several query heads share the keys and values of one.

With `model.attention_experts` its query heads are cut into experts that share keys and values, and what each gives is scaled by
its probability (mixture of attention heads; DS-MoE, Pan et al. 2024, equations 7 and 8).  All compute, in inference too."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megalina.blocks import context, memory
from megalina.blocks.attention import Attention
from megalina.blocks.block import norm_parameters, output_std
from megalina.blocks.context import HeadSizes
from megalina.blocks.heads import head_dim, rotary_width
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import At, Rank
from megalina.blocks.work import Piece, Work, linear, norm
from megalina.config import ModelConfig
from megalina.step.forward import Shape, compute, exchange, names
from megalina.step.program import Instruction, Op

TURNED = ("attention_turned", "attention_turned_heads")  # norms and positions of what was projected before


class GroupedQueryAttention(Attention):
    """Several query heads share the keys and values of one."""

    functions = "megalina.model.attention:GroupedQueryAttention"
    heavy = (*Attention.heavy, "attention_qkv", "attention_core", *TURNED)

    @property
    def deferrable(self) -> Sequence[str]:
        return [name for name in super().deferrable if name not in TURNED]

    @staticmethod
    def check(model: ModelConfig) -> None:
        if model.head_dim == 0 and model.d_model % model.num_heads:
            raise ValueError(
                f"model.num_heads ({model.num_heads}) must divide model.d_model ({model.d_model}): change one, or give "
                "model.head_dim"
            )
        if model.num_heads % model.num_kv_heads:
            raise ValueError(f"model.num_kv_heads ({model.num_kv_heads}) must divide model.num_heads ({model.num_heads})")
        if model.attention_experts == 1 or (model.attention_experts and model.num_heads % model.attention_experts):
            raise ValueError(
                f"model.attention_experts ({model.attention_experts}) must be 2 or more and divide model.num_heads "
                f"({model.num_heads}), or 0 for none: change one"
            )
        if model.attention_experts and model.qk_norm == "projection":
            raise ValueError(
                f"model.attention_experts ({model.attention_experts}) and model.qk_norm=projection exclude each other: set "
                "model.qk_norm=head or none"
            )
        sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if given := [name for name in sizes if getattr(model, name)]:
            raise ValueError(
                f"model.{given[0]} ({getattr(model, given[0])}) is of model.attention=mla alone, and this is gqa: set it to 0, "
                "or change model.attention"
            )

    @property
    def _normed_together(self) -> bool:
        return self.model.qk_norm == "projection"

    def parameters(self) -> Sequence[Parameter]:
        model, width = self.model, self.model.d_model
        q, kv, rows, tp = self._q(), self._kv(), {"tp": 0}, {"tp": 1}
        out = norm_parameters("attention_norm", model)
        sizes = (("q", q), ("k", kv), ("v", kv))
        clip = {n: ((size // model.num_kv_heads, n),) for n, size in sizes if n != "v"}  # of the heads that share a key head
        out += [Parameter(f"attention.{n}", (size, width), model.init_std, rows, clip=clip.get(n, ())) for n, size in sizes]
        out.append(Parameter("attention.proj", (width, q), output_std(model), tp))
        if self.bias != "none":
            out += [Parameter(f"attention.{n}_bias", (size,), 0.0, rows, clip=clip.get(n, ())) for n, size in sizes]
        if self.bias == "all":
            out.append(Parameter("attention.proj_bias", (width,), 0.0))  # added once, after the sum over tp
        if model.attention_experts:
            out.append(Parameter("attention.router", (model.attention_experts, width), model.init_std, matrix="router"))
        if model.attention_sinks:
            out.append(Parameter("attention.sinks", (model.num_heads,), model.init_std, rows))
        if model.qk_norm == "head":
            out += [Parameter(f"attention.{n}_norm.weight", (head_dim(model),), None) for n in ("q", "k")]
        if self._normed_together:
            out += [Parameter(f"attention.{n}_norm.weight", (size,), None, rows) for n, size in (("q", q), ("k", kv))]
        return out

    def _q(self) -> int:
        return self.model.num_heads * head_dim(self.model)

    def _kv(self) -> int:
        return self.model.num_kv_heads * head_dim(self.model)

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        """Where tp cuts what is normed together, the squares of all heads are summed before they are attended with."""
        lines = super().lines(shape, layer, reads, writes)
        if not shape.tp or not self._normed_together:
            return lines
        if shape.context:
            return self._summed_in_context(lines, shape, layer)
        at = next(i for i, line in enumerate(lines) if line.name == "attention_heads")
        (normed, _), own = lines[at].reads, shape.dense(layer)
        lines[at : at + 1] = [
            compute("attention_qkv", layer, normed, "q k v square_part", own),
            *exchange("attention_square", layer, Op.SUM, "tp", "square_part", "square"),
            compute("attention_core", layer, "q k v square #batch", "a_part", own),
        ]
        return lines

    def _summed_in_context(self, lines: list[Instruction], shape: Shape, layer: int) -> list[Instruction]:
        """Queries, keys and values first, then squares, and what is sent once they are normed."""
        making, own = ("attention_keys", "attention_queries", "attention_spread"), shape.dense(layer)
        turned, sent = ("attention_turned", "q_turned kv") if shape.context == "all_gather" else ("attention_turned_heads", "qkv")
        place = next(i for i, line in enumerate(lines) if line.name in making)
        squares = [
            compute("attention_qkv", layer, lines[place].reads[0], "q k v square_part", own),
            *exchange("attention_square", layer, Op.SUM, "tp", "square_part", "square"),
            compute(turned, layer, "q k v square #batch", sent, own),
        ]
        (q,), (q_turned,) = names("q", layer), names("q_turned", layer)
        rest = [
            replace(line, reads=tuple(q_turned if v == q else v for v in line.reads)) for line in lines if line.name not in making
        ]
        return [*rest[:place], *squares, *rest[place:]]

    def heads_work(self, at: At) -> Piece:
        match at.name:
            case name if name in TURNED:
                return self._turned_work(at)
            case "attention_qkv":
                return self._qkv_work(at)
            case "attention_core":
                return self._core_work(at)
        return self._qkv_work(at) + self._core_work(at)

    def _qkv_work(self, at: At) -> Piece:
        d, q, kv = self.model.d_model, self._q() / at.rank.tp, self._kv() / at.rank.tp
        return linear(at.rank, at.tokens, q, d) + linear(at.rank, at.tokens, kv, d) + linear(at.rank, at.tokens, kv, d)

    def _core_work(self, at: At) -> Piece:
        rank, model, d, size, tokens = at.rank, self.model, self.model.d_model, head_dim(self.model), at.tokens
        heads, groups = model.num_heads / rank.tp, model.num_kv_heads / rank.tp
        q, kv = heads * size, groups * size
        out = linear(rank, tokens, d, q)
        if turned := rotary_width(model):
            both = (heads + groups) * turned
            out += self.rotation_work(at, both, q + kv - both)
        if model.qk_norm == "head":
            out += norm(rank, tokens * heads, size) + norm(rank, tokens * groups, size)
        if self._normed_together:
            out += norm(rank, tokens, q) + norm(rank, tokens, kv)
        if model.attention_experts:
            out += self._experts_work(at)
        if optimizer_of(rank.config.optim).clips_heads:
            out += self.logits_work(at, size, q + kv)
        return out + self.core_work(at, size, size, 2 * (q + kv))

    def _experts_work(self, at: At) -> Piece:
        """Where heads are experts: their router, and what they give times their probabilities."""
        rank = at.rank
        router = linear(rank, at.tokens, self.model.attention_experts, rank.width, wide=rank.mixed)
        scaled_bytes = at.tokens * self._q() / rank.tp * rank.element
        return router + Piece(Work((), 3 * scaled_bytes, 6), Work((), 6 * scaled_bytes, 8))

    def heads_memory(self, at: At, *, whole: bool) -> Inside:
        match at.name:
            case name if name in TURNED:
                return self._turned_memory(at)
            case "attention_qkv":
                return self._qkv_memory(at)
            case "attention_core":
                return self._core_memory(at)
        rank, model, t = at.rank, self.model, int(at.tokens)
        width_q, width_g = self._q() // rank.tp, self._kv() // rank.tp
        x, q, g = t * rank.width * rank.element, t * width_q * rank.element, t * width_g * rank.element
        before, after = memory.Inside(), memory.Inside()
        if whole:
            before, after = memory.norm(rank, t), memory.residual(rank, t, bias=self.bias == "all")
        block, weights = self.scores(at)
        laid_out = (q + 2 * g) * self.is_blocked(rank)  # queries, keys and values once more, head by head
        told = self.logits_memory(at, head_dim(model))
        normed = before.kept + x * whole
        cores = 2 * q + 2 * g + weights  # queries, keys, values, what comes of them, attention weights
        turned = model.positions == "rope" or model.qk_norm != "none"
        kept = normed + cores
        if model.qk_norm != "none":
            kept += q + g
        if model.attention_experts:  # what came of the heads is kept before it is scaled, too
            scores = t * (model.attention_experts * rank.main + self.heads_here(at) * rank.element)
            kept += q + scores + (t * rank.width * rank.main if rank.mixed else 0)
        forward = max(
            before.forward + before.kept,
            normed + (q + 2 * g) + (q + g) * turned + told,
            kept + block + laid_out,
            kept + x + after.forward,
        )
        tail = x + before.backward - kept if whole else q + 2 * g + x - cores
        inner = q if weights > t * self.heads_here(at) * rank.main else 0  # its product with what came out
        if self.model.attention_experts:
            inner = max(inner, 2 * q)  # gradients of what the heads gave, before and after scaling
        core = 2 * q + 2 * g + max(inner, 2 * block + q + laid_out)
        backward = max(core, q + memory.outer(rank, rank.width, width_q), tail)
        return Inside(kept + after.kept, forward, backward)

    def _qkv_memory(self, at: At) -> Inside:
        """Squares are of at least float32."""
        rank, t = at.rank, int(at.tokens)
        width_q, width_g = self._q() // rank.tp, self._kv() // rank.tp
        q, g = t * width_q, t * width_g
        x, wide = t * rank.width * rank.element, (q + g) * rank.main * rank.mixed
        results = (q + 2 * g) * rank.element + 2 * t * rank.main
        gradients = (q + g) * (rank.element + rank.main * rank.mixed)  # those of squares, with those that came
        return Inside(wide, results + wide, max(gradients, x + memory.outer(rank, rank.width, width_q)))

    def _core_memory(self, at: At) -> Inside:
        """What it reads is kept as it is: the norms' inputs, and values."""
        rank, t = at.rank, int(at.tokens)
        width_q, width_g = self._q() // rank.tp, self._kv() // rank.tp
        x, q, g = t * rank.width * rank.element, t * width_q * rank.element, t * width_g * rank.element
        block, weights = self.scores(at)
        laid_out = (q + 2 * g) * self.is_blocked(rank)
        kept = 2 * q + g + weights + 2 * t * rank.main
        forward = max(2 * (q + g), kept + max(block + laid_out, x))
        inner = q if weights > t * self.heads_here(at) * rank.main else 0
        core = 2 * q + 2 * g + max(inner, 2 * block + q + laid_out)
        backward = max(core, q + memory.outer(rank, rank.width, width_q))
        return Inside(kept, forward, backward)

    def keeps(self, at: At) -> Sequence[str]:
        """Gradients of squares need what they are of."""
        if at.name != "attention_qkv" or at.rank.mixed:
            return super().keeps(at)
        return [v for v in at.instruction.writes if v.startswith(("q.", "k."))]

    def deferred(self, at: At) -> Deferred:
        """The products' inputs, what attention gave among them, and the gradients of queries, keys and values."""
        if at.name in context.NAMES:
            return context.deferred(self, at)
        rank, t, whole = at.rank, int(at.tokens), at.rank.tp == 1
        q, g = self._q() // rank.tp, self._kv() // rank.tp
        rise = memory.outer(rank, rank.width, q)
        match at.name:
            case "attention_qkv":
                return Deferred(t * (q + 2 * g) * rank.element, reads=True, rise=rise)
            case "attention_core":
                return Deferred(t * q * rank.element, gradients=True, rise=rise)
        kept = t * (rank.width * whole + 2 * q + 2 * g) * rank.element
        kept += t * self.model.attention_experts * rank.main  # the gradients of their scores
        return Deferred(kept, reads=not whole, gradients=True, rise=rise)

    def value_bytes(self, at: At) -> Mapping[str, int]:
        rank, t = at.rank, int(at.tokens)
        q, g = (t * number // rank.tp * rank.element for number in (self._q(), self._kv()))
        squares = 2 * t * rank.main
        return {**super().value_bytes(at), "q": q, "q_turned": q, "k": g, "v": g, "square_part": squares, "square": squares}

    # with context parallelism
    def head_sizes(self, rank: Rank) -> HeadSizes:
        size, groups = head_dim(self.model), self.model.num_kv_heads // rank.tp
        return HeadSizes(self.model.num_heads // rank.tp, groups, size, size, 2 * groups * size)

    def queries_work(self, at: At) -> Piece:
        heads = self.model.num_heads / at.rank.tp
        return linear(at.rank, at.tokens, heads * head_dim(self.model), at.rank.width) + self._turning_work(at, heads)

    def keys_work(self, at: At) -> Piece:
        groups = self.model.num_kv_heads / at.rank.tp
        numbers = groups * head_dim(self.model)
        one = linear(at.rank, at.tokens, numbers, at.rank.width)
        joined = Work((), 4 * at.tokens * numbers * at.rank.element, 1)
        return one + one + self._turning_work(at, groups) + Piece(joined, joined)

    def _turning_work(self, at: At, heads: float) -> Piece:
        """Norm and rotation of so many heads."""
        out, size = Piece(), head_dim(self.model)
        if turned := rotary_width(self.model):
            out += self.rotation_work(at, heads * turned, heads * (size - turned))
        if self.model.qk_norm == "head":
            out += norm(at.rank, at.tokens * heads, size)
        if self._normed_together:
            out += norm(at.rank, at.tokens, heads * size)
        return out

    def out_work(self, at: At) -> Piece:
        out = linear(at.rank, at.tokens, at.rank.width, self._q() / at.rank.tp)
        return out + self._experts_work(at) if self.model.attention_experts else out

    def queries_memory(self, at: At) -> Inside:
        q = int(at.tokens) * self._q() // at.rank.tp * at.rank.element
        return self._turning_memory(q, q)

    def keys_memory(self, at: At) -> Inside:
        g = int(at.tokens) * self._kv() // at.rank.tp * at.rank.element
        return self._turning_memory(g, 4 * g)

    def _turning_memory(self, turned: int, made: int) -> Inside:
        """Norm and rotation of so many bytes; `made`: of all that is made."""
        normed, turns = self.model.qk_norm != "none", self.model.positions == "rope"
        kept = turned * normed
        return Inside(kept, kept + made + turned * turns, made + turned * (1 + normed))

    def _turned_work(self, at: At) -> Piece:
        """Of what is normed together: norms, rotation, and what is sent."""
        rank, heads, groups = at.rank, self.model.num_heads / at.rank.tp, self.model.num_kv_heads / at.rank.tp
        size, sizes = head_dim(self.model), self.head_sizes(at.rank)
        spread = at.all_tokens * sizes.spread(rank.cp) if at.name == "attention_turned_heads" else 0
        moved_bytes = (4 * at.tokens * groups * size + 8 * spread) * rank.element
        return self._turning_work(at, heads) + self._turning_work(at, groups) + Piece(*(Work((), moved_bytes, 4),) * 2)

    def _turned_memory(self, at: At) -> Inside:
        """Norms keep what they read, and a number for each token."""
        rank, t = at.rank, int(at.tokens)
        q, g = (t * number // rank.tp * rank.element for number in (self._q(), self._kv()))
        sent = int(at.all_tokens) * self.head_sizes(rank).spread(rank.cp) * rank.element
        copies = 3 * sent - q if at.name == "attention_turned_heads" else 0
        return Inside(2 * t * rank.main, 2 * (q + g) + 2 * g + copies, 2 * (q + g) + 2 * g + copies)

    def scaled_bytes(self, at: At) -> int:
        rank, t, model = at.rank, int(at.tokens), self.model
        if not model.attention_experts:
            return 0
        scores = t * (model.attention_experts * rank.main + self.heads_here(at) * rank.element)
        return t * self._q() // rank.tp * rank.element + scores + (t * rank.width * rank.main if rank.mixed else 0)
