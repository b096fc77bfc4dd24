"""Attention behind a norm and beside a residual: what all kinds have in common.

A block is of layers that have the same window: its model's `window` is theirs (`model_of_layer`).

Where context parallelism cuts sequences, a rank's queries meet the keys and values of all tokens, which are gathered while
queries are made (`all_gather`), or ranks exchange heads for tokens, before and after (`all_to_all`): docs/long-context.md."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from megalina.blocks import context, memory
from megalina.blocks.block import Block, between
from megalina.blocks.context import HeadSizes
from megalina.blocks.heads import attention_bias
from megalina.blocks.memory import Inside
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.sizes import At, Rank
from megalina.blocks.work import Piece, Product, Work, norm, residual
from megalina.config import ModelConfig
from megalina.step.forward import Shape, compute, exchange
from megalina.step.program import Instruction, Op

# On CPU: tokens of a sequence that is attended to by blocks of queries.
SHORTEST_BLOCKED = 129  # at 64 the fused kernel takes half the time, at 192 it takes 1.1 times as long
LONGEST_BLOCKED = 1024  # keys of a query: saved attention weights grow with their number
QUERIES_A_BLOCK = 64
SEQUENCES_A_BLOCK = 4  # without documents


def in_blocks(length: int, window: int) -> bool:
    """Whether sequences of so many tokens are attended to by blocks of queries, on CPU in at least float32."""
    return length >= SHORTEST_BLOCKED and min(length, window or length) <= LONGEST_BLOCKED


def _seen(length: int) -> int:
    """Pairs of a query and a key of a sequence that blocks of queries multiply."""
    return sum(min(b + QUERIES_A_BLOCK, length) * min(QUERIES_A_BLOCK, length - b) for b in range(0, length, QUERIES_A_BLOCK))


class Attention(Block):
    """Any attention; a kind of it declares its own parameters, and what it does between norm and residual."""

    name = "attention"
    heavy: ClassVar[tuple[str, ...]] = ("attention", "attention_heads", *context.NAMES)

    @property
    def deferrable(self) -> Sequence[str]:
        return [name for name in self.heavy if name != "attention_of_heads"]  # which has no products with weights

    @staticmethod
    @abstractmethod
    def check(model: ModelConfig) -> None:
        """ValueError for settings that contradict each other, or mean nothing here."""

    @abstractmethod
    def heads_work(self, at: At) -> Piece:
        """Between norm and residual."""

    @abstractmethod
    def heads_memory(self, at: At, *, whole: bool) -> Inside:
        """`whole`: with norm and residual."""

    @property
    def bias(self) -> str:
        return attention_bias(self.model)

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        if shape.context:
            return self._lines_in_context(shape, layer, reads, writes)
        logit = " #logit" if shape.head_logits else ""
        if not shape.tp:
            return [compute("attention", layer, f"{reads} #batch", writes + logit, shape.dense(layer))]
        uses = (shape.dense(layer), shape.copied(layer))
        return [
            *between(shape, layer, "attention", "heads", reads, "n", "a", uses, logit),
            compute("attention_residual", layer, f"{reads} a #batch", writes, shape.copied(layer)),
        ]

    def _lines_in_context(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        """With tp between norm and sum, as without context parallelism."""
        uses, logit = (shape.dense(layer), shape.copied(layer)), " #logit" if shape.head_logits else ""
        n = "n_all" if shape.tp and shape.sequence else "n"
        experts = f"{n} " if self.model.attention_experts else ""
        first, own, stream, out = (n, "", "", "a_part") if shape.tp else (reads, "n ", f"{reads} ", writes)
        if shape.context == "all_gather":
            start, wait = exchange("attention_kv", layer, Op.GATHER, "cp", "kv", "kv_all")
            inner = [
                compute("attention_keys", layer, f"{first} #batch", f"{own}kv", *uses),
                start,
                compute("attention_queries", layer, f"{n} #batch", "q", *uses),  # while keys and values travel
                wait,
                compute("attention_gathered", layer, f"q kv_all {experts}{stream}#batch", out + logit, *uses),
            ]
        else:
            sinks = uses[:1] if self.model.attention_sinks else ()
            inner = [
                compute("attention_spread", layer, f"{first} #batch", f"{own if experts else ''}qkv", *uses),
                *exchange("attention_out", layer, Op.EVEN, "cp", "qkv", "qkv_all"),
                compute("attention_of_heads", layer, "qkv_all #batch", f"mixed_part{logit}", *sinks),
                *exchange("attention_back", layer, Op.EVEN, "cp", "mixed_part", "mixed_all"),
                compute("attention_joined", layer, f"mixed_all {experts}{stream}#batch", out, *uses),
            ]
        if not shape.tp:
            return inner
        around = between(shape, layer, "attention", "heads", reads, "n", "a", uses)
        place = next(i for i, line in enumerate(around) if line.name == "attention_heads")
        residual = compute("attention_residual", layer, f"{reads} a #batch", writes, shape.copied(layer))
        return [*around[:place], *inner, *around[place + 1 :], residual]

    def work(self, at: At) -> Piece:
        if at.name in context.NAMES:
            return context.work(self, at)
        match at.name:
            case "attention_norm":
                return norm(at.rank, at.held)
            case "attention_residual":
                return residual(at.rank, at.held)
            case "attention":
                return norm(at.rank, at.tokens) + self.heads_work(at) + residual(at.rank, at.tokens)
        return self.heads_work(at)

    def memory(self, at: At) -> Inside:
        if at.name in context.NAMES:
            return context.inside(self, at)
        match at.name:
            case "attention_norm":
                return memory.norm(at.rank, int(at.held))
            case "attention_residual":
                return memory.residual(at.rank, int(at.held), bias=self.bias == "all")
        return self.heads_memory(at, whole=at.rank.tp == 1)

    def value_bytes(self, at: At) -> Mapping[str, int]:
        number = at.rank.width * at.rank.element
        held, tokens = int(at.held) * number, int(at.tokens) * number
        found = {"n": held, "n_all": tokens, "a_part": tokens, "a": held}
        return found if at.rank.cp == 1 else {**found, **context.value_bytes(self, at)}

    def keeps(self, at: At) -> Sequence[str]:
        """Where keys or what is spread come of the norm, it is a value, of which keys are a product."""
        norms = at.name in ("attention_keys", "attention_spread")
        return [v for v in at.instruction.writes if norms and v.startswith("n.")]

    # with context parallelism
    @abstractmethod
    def head_sizes(self, rank: Rank) -> HeadSizes:
        """Of one rank of tensor parallelism; this and what follows as in `InContext`."""

    @abstractmethod
    def queries_work(self, at: At) -> Piece: ...

    @abstractmethod
    def keys_work(self, at: At) -> Piece: ...

    def making_work(self, at: At, tokens: float) -> Piece:
        return Piece()

    def core_of(self, at: At) -> Piece:
        sizes = self.head_sizes(at.rank)
        read = sizes.heads * (sizes.query + sizes.value) + sizes.groups * (sizes.query + sizes.value)
        out = self.core_work(at, sizes.query, sizes.value, read)
        if optimizer_of(at.rank.config.optim).clips_heads:
            out += self.logits_work(at, sizes.query, (sizes.heads + sizes.groups) * sizes.query)
        return out

    @abstractmethod
    def out_work(self, at: At) -> Piece: ...

    @abstractmethod
    def queries_memory(self, at: At) -> Inside: ...

    @abstractmethod
    def keys_memory(self, at: At) -> Inside: ...

    def made_bytes(self, rank: Rank, tokens: int) -> int:
        return 0

    def scaled_bytes(self, at: At) -> int:
        return 0

    @property
    def output_bias(self) -> bool:
        return self.bias == "all"

    # pieces of which a kind is made
    def heads_here(self, at: At) -> int:
        return self.model.num_heads // at.rank.tp

    def core_work(self, at: At, query: float, value: float, read: float) -> Piece:
        """Products of queries with keys and of weights with values, so many numbers a head each; `read`: numbers of a token that
        they read and write, of all heads here.  The mask leaves half of all pairs of tokens, a window fewer."""
        rank, length = at.rank, at.rank.seq_len
        outside = max(0, length - self.model.window) if self.model.window else 0
        pairs = (length**2 - outside**2) / 2  # a head and sequence
        heads = at.tokens / length * self.heads_here(at)
        one = Product(length, (query + value) / 2, 2 * pairs / length, heads, at.tokens * read * rank.element, attention=True)
        two = Product(length, (query + value) / 2, 2 * pairs / length, 2 * heads, 2 * one.num_bytes, attention=True)
        return Piece(Work((one,)), Work((two,)))

    def is_blocked(self, rank: Rank) -> bool:
        return not (rank.cuda or rank.mixed) and in_blocks(rank.seq_len, self.model.window)

    def scores(self, at: At) -> tuple[int, int]:
        """Of attention's core: what one block needs, and what is kept beside queries, keys, values and result."""
        return self.scores_of(at.rank, int(at.tokens), self.heads_here(at))

    def scores_of(self, rank: Rank, tokens: int, heads: int) -> tuple[int, int]:
        """The same of so many heads, and tokens of whole sequences."""
        t, s = tokens, rank.seq_len
        sums = t * heads * rank.main  # log-sum-exps
        if not self.is_blocked(rank):
            return 0, sums
        seen = most = 0
        for begin in range(0, s, QUERIES_A_BLOCK):
            end = min(begin + QUERIES_A_BLOCK, s)
            keys = end - max(0, begin - self.model.window + 1 if self.model.window else 0)
            seen, most = seen + keys * (end - begin), max(most, keys)
        kept = t // s * heads * seen * rank.element + sums * self.model.attention_sinks
        return min(SEQUENCES_A_BLOCK, t // s) * QUERIES_A_BLOCK * most * heads * rank.element, kept

    def logits_work(self, at: At, size: int, numbers: float) -> Piece:
        """For QK-clip, logits once more, in blocks, which see little of what the mask hides; `size`: of a head's query, `numbers`
        of a token's queries and keys here."""
        rank, tokens, length = at.rank, at.tokens, at.rank.seq_len
        heads, seen = self.model.num_heads / rank.tp, _seen(length) / length  # keys, on average
        seen_bytes = 4 * tokens * heads * seen * rank.element
        again = Product(length, seen, size, tokens / length * heads, tokens * numbers * rank.element + seen_bytes / 2)
        return Piece(Work((again,), seen_bytes, 6 * math.ceil(length / QUERIES_A_BLOCK)))

    def logits_memory(self, at: At, size: int) -> int:
        """For QK-clip, where the optimizer has it: logits of a block of queries, and the queries; `size` numbers of a head."""
        rank = at.rank
        if not optimizer_of(rank.config.optim).clips_heads:
            return 0
        queries, heads = min(QUERIES_A_BLOCK, rank.seq_len), int(at.tokens) * self.heads_here(at)
        return heads * queries * rank.element + heads * size * rank.element * queries // rank.seq_len

    def rotation_work(self, at: At, turned: float, passed: float) -> Piece:
        """Rotation of so many numbers of a token, and the others beside them, which are copied."""
        turned_bytes, passed_bytes = 5 * at.tokens * turned * at.rank.element, 2 * at.tokens * passed * at.rank.element
        kernels = 8 + 2 * (passed > 0)
        return Piece(*(Work((), turned_bytes + passed_bytes, kernels),) * 2)
