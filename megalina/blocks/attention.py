"""Grouped-query attention behind a norm and beside a residual.

With `model.attention_experts` its query heads are cut into experts that share keys and values, and what each gives is scaled by
its probability (mixture of attention heads; DS-MoE, Pan et al. 2024, equations 7 and 8).  All compute, in inference too."""

import math
from collections.abc import Mapping, Sequence

from megalina.blocks import memory
from megalina.blocks.block import Block, between, norm_parameters, output_std
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import At
from megalina.blocks.work import Piece, Product, Work, linear, norm, residual
from megalina.config import ModelConfig
from megalina.step.forward import Shape, compute
from megalina.step.program import Instruction

# On CPU: tokens of a sequence that is attended to by blocks of queries.
SHORTEST_BLOCKED = 129  # at 64 the fused kernel takes half the time, at 192 it takes 1.1 times as long
LONGEST_BLOCKED = 1024  # saved attention weights grow with the square
QUERIES_A_BLOCK = 64


def head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.d_model // model.num_heads


def _seen(length: int) -> int:
    """Pairs of a query and a key of a sequence that blocks of queries multiply."""
    return sum(min(b + QUERIES_A_BLOCK, length) * min(QUERIES_A_BLOCK, length - b) for b in range(0, length, QUERIES_A_BLOCK))


class Attention(Block):
    name = "attention"
    functions = "megalina.model.attention:Attention"
    heavy = ("attention", "attention_heads")

    @property
    def deferrable(self) -> Sequence[str]:
        return self.heavy

    def parameters(self) -> Sequence[Parameter]:
        model, width = self.model, self.model.d_model
        q, kv, rows, tp = self._q(), self._kv(), {"tp": 0}, {"tp": 1}
        out = norm_parameters("attention_norm", model)
        sizes = (("q", q), ("k", kv), ("v", kv))
        clip = {n: ((size // model.num_kv_heads, n),) for n, size in sizes if n != "v"}  # of the heads that share a key head
        out += [Parameter(f"attention.{n}", (size, width), model.init_std, rows, clip=clip.get(n, ())) for n, size in sizes]
        out.append(Parameter("attention.proj", (width, q), output_std(model), tp))
        if model.bias:
            out += [Parameter(f"attention.{n}_bias", (size,), 0.0, rows, clip=clip.get(n, ())) for n, size in sizes]
            out.append(Parameter("attention.proj_bias", (width,), 0.0))  # added once, after the sum over tp
        if model.attention_experts:
            out.append(Parameter("attention.router", (model.attention_experts, width), model.init_std, matrix="router"))
        if model.qk_norm:
            out += [Parameter(f"attention.{n}_norm.weight", (head_dim(model),), None) for n in ("q", "k")]
        return out

    def _q(self) -> int:
        return self.model.num_heads * head_dim(self.model)

    def _kv(self) -> int:
        return self.model.num_kv_heads * head_dim(self.model)

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        logit = " #logit" if shape.head_logits else ""
        if not shape.tp:
            return [compute("attention", layer, f"{reads} #batch", writes + logit, shape.dense(layer))]
        uses = (shape.dense(layer), shape.copied(layer))
        return [
            *between(shape, layer, "attention", "heads", reads, "n", "a", uses, logit),
            compute("attention_residual", layer, f"{reads} a #batch", writes, shape.copied(layer)),
        ]

    def work(self, at: At) -> Piece:
        match at.name:
            case "attention_norm":
                return norm(at.rank, at.held)
            case "attention_residual":
                return residual(at.rank, at.held)
            case "attention_heads":
                return self._heads_work(at)
        return norm(at.rank, at.tokens) + self._heads_work(at) + residual(at.rank, at.tokens)

    def _heads_work(self, at: At) -> Piece:
        rank, model, d, size = at.rank, self.model, self.model.d_model, head_dim(self.model)
        tokens, length = at.tokens, rank.seq_len
        heads, groups = model.num_heads / rank.tp, model.num_kv_heads / rank.tp
        q, kv = heads * size, groups * size
        out = linear(rank, tokens, q, d) + linear(rank, tokens, kv, d) + linear(rank, tokens, kv, d) + linear(rank, tokens, d, q)
        if model.positions == "rope":
            turned_bytes = 5 * tokens * (q + kv) * rank.element
            out += Piece(Work((), turned_bytes, 8), Work((), turned_bytes, 8))
        if model.qk_norm:
            out += norm(rank, tokens * heads, size) + norm(rank, tokens * groups, size)
        if experts := model.attention_experts:
            router = linear(rank, tokens, experts, d, wide=rank.mixed)
            scaled_bytes = tokens * q * rank.element
            out += router + Piece(Work((), 3 * scaled_bytes, 6), Work((), 6 * scaled_bytes, 8))
        sequences = tokens / length
        # Two products, queries with keys and weights with values, of which the mask leaves a half: together one whole.
        one = Product(length, size, length, sequences * heads, tokens * 2 * (q + kv) * rank.element, attention=True)
        two = Product(length, size, length, 2 * sequences * heads, tokens * 4 * (q + kv) * rank.element, attention=True)
        if optimizer_of(rank.config.optim).clips_heads:  # logits once more, in blocks, which see little of what the mask hides
            seen = _seen(length) / length  # keys, on average
            seen_bytes = 4 * tokens * heads * seen * rank.element
            again = Product(length, seen, size, sequences * heads, tokens * (q + kv) * rank.element + seen_bytes / 2)
            out += Piece(Work((again,), seen_bytes, 6 * math.ceil(length / QUERIES_A_BLOCK)))
        return out + Piece(Work((one,)), Work((two,)))

    def memory(self, at: At) -> Inside:
        match at.name:
            case "attention_norm":
                return memory.norm(at.rank, int(at.held))
            case "attention_residual":
                return memory.residual(at.rank, int(at.held))
        return self._heads_memory(at, whole=at.rank.tp == 1)

    def _heads_memory(self, at: At, *, whole: bool) -> Inside:
        """`whole`: with norm and residual."""
        rank, model, t = at.rank, self.model, int(at.tokens)
        width_q, width_g = self._q() // rank.tp, self._kv() // rank.tp
        x, q, g = t * rank.width * rank.element, t * width_q * rank.element, t * width_g * rank.element
        before, after = (memory.norm(rank, t), memory.residual(rank, t)) if whole else (Inside(), Inside())
        block, weights = self._scores(at)
        told = 0  # logits of a block of queries, and the queries
        if optimizer_of(rank.config.optim).clips_heads:
            queries = min(QUERIES_A_BLOCK, rank.seq_len)
            told = t * self._heads_here(at) * queries * rank.element + q * queries // rank.seq_len
        normed = before.kept + x * whole
        cores = 2 * q + 2 * g + weights  # queries, keys, values, what comes of them, attention weights
        turned = model.positions == "rope" or model.qk_norm
        kept = normed + cores
        if model.qk_norm:
            kept += q + g
        if model.attention_experts:  # what came of the heads is kept before it is scaled, too
            scores = t * (model.attention_experts * rank.main + self._heads_here(at) * rank.element)
            kept += q + scores + (t * rank.width * rank.main if rank.mixed else 0)
        forward = max(
            before.forward + before.kept,
            normed + (q + 2 * g) + (q + g) * turned + told,
            kept + block,
            kept + x + after.forward,
        )
        tail = x + before.backward - kept if whole else q + 2 * g + x - cores
        inner = q if weights > t * self._heads_here(at) * rank.main else 0  # its product with what came out
        if self.model.attention_experts:
            inner = max(inner, 2 * q)  # gradients of what the heads gave, before and after scaling
        backward = max(2 * q + 2 * g + max(inner, 2 * block), q + memory.outer(rank, rank.width, width_q), tail)
        return Inside(kept + after.kept, forward, backward)

    def deferred(self, at: At) -> Deferred:
        """The products' inputs, what attention gave among them, and the gradients of queries, keys and values."""
        rank, t, whole = at.rank, int(at.tokens), at.rank.tp == 1
        q, g = self._q() // rank.tp, self._kv() // rank.tp
        kept = t * (rank.width * whole + 2 * q + 2 * g) * rank.element
        kept += t * self.model.attention_experts * rank.main  # the gradients of their scores
        return Deferred(kept, reads=not whole, gradients=True, rise=memory.outer(rank, rank.width, q))

    def _heads_here(self, at: At) -> int:
        return self.model.num_heads // at.rank.tp

    def _scores(self, at: At) -> tuple[int, int]:
        """Of attention's core: what one block needs, and what is kept beside queries, keys, values and result."""
        rank, t, s = at.rank, int(at.tokens), at.rank.seq_len
        heads = self._heads_here(at)
        if rank.cuda or rank.mixed or not SHORTEST_BLOCKED <= s <= LONGEST_BLOCKED:
            return 0, t * heads * rank.main  # log-sum-exps
        return QUERIES_A_BLOCK * s * heads * rank.element, t // s * heads * _seen(s) * rank.element

    def value_bytes(self, at: At) -> Mapping[str, int]:
        number = at.rank.width * at.rank.element
        held, tokens = int(at.held) * number, int(at.tokens) * number
        return {"n": held, "n_all": tokens, "a_part": tokens, "a": held}
