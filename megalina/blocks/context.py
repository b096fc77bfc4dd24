"""What attention's instructions ask and keep where each sequence is cut over the ranks of context parallelism.

Queries of a rank's own tokens meet the keys of all (`attention_gathered`), or some heads' queries of all tokens theirs
(`attention_of_heads`): the same products.  A kind of attention says what leads there and away (`InContext`); it follows
`megalina/model/context_attention.py` tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megalina.blocks import memory
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.sizes import At, Rank
from megalina.blocks.work import Piece, Work, norm, residual

NAMES = (
    *("attention_keys", "attention_queries", "attention_gathered"),  # of all_gather
    *("attention_spread", "attention_of_heads", "attention_joined"),  # of all_to_all
)


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """Of one rank of tensor parallelism."""

    heads: int
    groups: int  # heads of keys
    query: int  # numbers of a query, and of a key
    value: int
    compact: int  # numbers of a token that all its keys and values are made of: what is gathered

    def of_rank(self, cp: int) -> int:
        """Heads of keys of a rank of context parallelism; several have the same one where there are too few."""
        return max(1, self.groups // cp)

    def spread(self, cp: int) -> int:
        """Numbers of a token that a rank sends to one other, or to itself."""
        return self.heads // cp * self.query + self.of_rank(cp) * (self.query + self.value)


class InContext(Protocol):
    """What a kind of attention declares."""

    def head_sizes(self, rank: Rank) -> HeadSizes: ...

    def queries_work(self, at: At) -> Piece:
        """From normed tokens to queries with positions."""
        ...

    def keys_work(self, at: At) -> Piece:
        """From normed tokens to what keys and values are made of."""
        ...

    def making_work(self, at: At, tokens: float) -> Piece:
        """Keys and values of so many tokens."""
        ...

    def core_of(self, at: At) -> Piece:
        """Products of queries with keys, weights with values, and what else sees them."""
        ...

    def out_work(self, at: At) -> Piece: ...

    def queries_memory(self, at: At) -> Inside:
        """Backward without the gradient of the normed tokens, as of keys."""
        ...

    def keys_memory(self, at: At) -> Inside: ...

    def made_bytes(self, rank: Rank, tokens: int) -> int:
        """Of the keys and values of so many tokens, besides what they are made of."""
        ...

    def scaled_bytes(self, at: At) -> int:
        """Kept where heads are experts, beside what they give."""
        ...

    def is_blocked(self, rank: Rank) -> bool:
        """Whether whole sequences are attended to by blocks of queries."""
        ...

    def scores_of(self, rank: Rank, tokens: int, heads: int) -> tuple[int, int]:
        """Of the core over whole sequences: what one block needs, and what is kept beside queries, keys, values and result."""
        ...

    @property
    def output_bias(self) -> bool: ...


def work(kind: InContext, at: At) -> Piece:
    rank, whole, sizes = at.rank, at.rank.tp == 1, kind.head_sizes(at.rank)
    before, after = (norm(rank, at.tokens), residual(rank, at.tokens)) if whole else (Piece(), Piece())
    match at.name:
        case "attention_keys":
            return before + kind.keys_work(at)
        case "attention_queries":
            return kind.queries_work(at)
        case "attention_gathered":
            in_order = _copied(rank, at.all_tokens * sizes.compact, 2)
            return in_order + kind.making_work(at, at.all_tokens) + kind.core_of(at) + kind.out_work(at) + after
        case "attention_spread":
            spread = _copied(rank, at.all_tokens * sizes.spread(rank.cp), 4)
            return before + kind.keys_work(at) + kind.queries_work(at) + kind.making_work(at, at.tokens) + spread
        case "attention_of_heads":
            moved = at.all_tokens * (sizes.spread(rank.cp) + sizes.heads // rank.cp * sizes.value)
            return _copied(rank, moved, 4) + kind.core_of(at)
    return _copied(rank, at.tokens * sizes.heads * sizes.value, 1) + kind.out_work(at) + after


def _copied(rank: Rank, numbers: float, kernels: float) -> Piece:
    """Numbers put in another order, there and back."""
    once = Work((), 2 * numbers * rank.element, kernels)
    return Piece(once, once)


def inside(kind: InContext, at: At) -> Inside:
    """The memory of one instruction."""
    match at.name:
        case "attention_keys":
            return _with_norm(at, kind.keys_memory(at))
        case "attention_queries":
            return _with_normed_gradient(at, kind.queries_memory(at))
        case "attention_gathered":
            return _gathered(kind, at)
        case "attention_spread":
            return _spread(kind, at)
        case "attention_of_heads":
            return _of_heads(kind, at)
    sizes = kind.head_sizes(at.rank)
    given = int(at.tokens) * sizes.heads * sizes.value * at.rank.element
    return _with_output(kind, at, Inside(given, given, given))


def _x(at: At) -> int:
    return int(at.tokens) * at.rank.width * at.rank.element


def _with_normed_gradient(at: At, of: Inside) -> Inside:
    rank = at.rank
    return Inside(of.kept, of.forward, of.backward + _x(at) + memory.outer(rank, rank.width, rank.width))


def _with_norm(at: At, of: Inside) -> Inside:
    """Without tensor parallelism the norm comes first; what it gives is a value, or kept."""
    of = _with_normed_gradient(at, of)
    if at.rank.tp > 1:
        return of
    before, x = memory.norm(at.rank, int(at.tokens)), _x(at)
    forward = max(before.forward + before.kept, before.kept + x + of.forward)
    return Inside(before.kept + of.kept, forward, max(of.backward, x + before.backward))


def _with_output(kind: InContext, at: At, of: Inside) -> Inside:
    """What the heads give is `of`; the output matrix and, without tensor parallelism, the residual come behind it."""
    rank, x = at.rank, _x(at)
    sizes = kind.head_sizes(rank)
    given = int(at.tokens) * sizes.heads * sizes.value * rank.element
    after = memory.residual(rank, int(at.tokens), bias=kind.output_bias) if rank.tp == 1 else Inside()
    kept = of.kept + kind.scaled_bytes(at)
    forward = max(of.forward, kept + x + after.forward)
    backward = max(of.backward + given, given + x * (rank.tp == 1) + memory.outer(rank, rank.width, sizes.heads * sizes.value))
    return Inside(kept + after.kept, forward, backward)


def _gathered(kind: InContext, at: At) -> Inside:
    """Of a rank whose last piece is the sequence's.  Keys and values are made anew in backward, where a turn's gradients of them
    are added to those so far."""
    rank, sizes, t, everybody = at.rank, kind.head_sizes(at.rank), int(at.tokens), int(at.all_tokens)
    widest = max(sizes.query, sizes.value)
    q, given = (t * sizes.heads * n * rank.element for n in (sizes.query, sizes.value))
    compact, made = everybody * sizes.compact * rank.element, kind.made_bytes(rank, everybody)
    gradients = everybody * sizes.groups * 2 * widest * rank.element
    wide = 0  # copies of what is narrower, where the kernel has one width for all
    if not rank.cuda and sizes.query != sizes.value:
        narrow = 2 if sizes.value < sizes.query else 1  # results and their gradients, or queries
        wide = (everybody * sizes.groups + narrow * t * sizes.heads) * widest * rank.element
    kept = given + t * sizes.heads * rank.main
    backward = q + max(compact + made + wide + 2 * gradients, 2 * compact + 2 * made + gradients, 3 * compact + gradients)
    return _with_output(kind, at, Inside(kept, kept + compact + made + wide, backward))


def _spread(kind: InContext, at: At) -> Inside:
    rank, sizes, t = at.rank, kind.head_sizes(at.rank), int(at.tokens)
    keys, queries = kind.keys_memory(at), kind.queries_memory(at)
    x, q = _x(at), t * sizes.heads * sizes.query * rank.element
    compact, made = t * sizes.compact * rank.element, kind.made_bytes(rank, t)
    sent = int(at.all_tokens) * sizes.spread(rank.cp) * rank.element
    copies = sent - q  # of keys and values
    kept = keys.kept + queries.kept + (compact if made else 0)
    normed = x if rank.tp == 1 and not kind.scaled_bytes(at) else 0  # else it is a value
    forward = kept + max(q + keys.forward, q + compact + made + copies + 2 * sent)
    backward = max(2 * q + made + 2 * compact + copies, queries.backward + compact, keys.backward + q)
    found = _with_norm(at, Inside(kept, forward, backward))
    return Inside(found.kept + normed, found.forward, found.backward)


def _of_heads(kind: InContext, at: At) -> Inside:
    rank, sizes, everybody = at.rank, kind.head_sizes(at.rank), int(at.all_tokens)
    heads = sizes.heads // rank.cp
    sent, given = everybody * sizes.spread(rank.cp) * rank.element, everybody * heads * sizes.value * rank.element
    block, weights = kind.scores_of(rank, everybody, heads)
    kept = sent + given + weights
    if not (rank.cuda or kind.is_blocked(rank) or sizes.query == sizes.value):  # the kernel has one width for all
        widest, narrow = max(sizes.query, sizes.value), sizes.of_rank(rank.cp) + heads
        kept += everybody * narrow * widest * rank.element - given * (sizes.value < sizes.query)
    laid_out = sent * kind.is_blocked(rank)  # queries, keys and values once more, head by head
    forward = max(2 * sent, kept + block + laid_out, kept + 2 * given)
    return Inside(kept, forward, 2 * given + 3 * sent + 2 * block + laid_out + given * kind.is_blocked(rank))


def deferred(kind: InContext, at: At) -> Deferred:
    """The products' inputs and the gradients of what they gave.  Where a norm is in the same instruction, what it gave is a value
    of the list or kept."""
    rank, sizes, t = at.rank, kind.head_sizes(at.rank), int(at.tokens)
    whole, outer = rank.tp == 1, memory.outer(rank, rank.width, sizes.heads * sizes.query)
    q, compact = t * sizes.heads * sizes.query * rank.element, t * sizes.compact * rank.element
    x, given = _x(at), t * sizes.heads * sizes.value * rank.element
    match at.name:
        case "attention_keys":
            return Deferred(2 * compact + x * whole, reads=not whole, rise=outer)
        case "attention_queries":
            return Deferred(q + kind.queries_memory(at).kept, reads=True, rise=outer)
        case "attention_gathered":
            everybody = int(at.all_tokens)
            made = kind.made_bytes(rank, everybody)
            up = made + everybody * sizes.compact * rank.element if made else 0
            return Deferred(given + up + kind.scaled_bytes(at), gradients=True, rise=outer)
        case "attention_spread":
            made = kind.made_bytes(rank, t)
            kept = q + 2 * compact + made + kind.queries_memory(at).kept + x * whole
            return Deferred(kept, reads=not whole, rise=outer)
    return Deferred(given + kind.scaled_bytes(at), gradients=True, rise=outer)


def value_bytes(kind: InContext, at: At) -> Mapping[str, int]:
    """Of the values between these instructions."""
    rank, sizes, t, everybody = at.rank, kind.head_sizes(at.rank), int(at.tokens), int(at.all_tokens)
    spread = everybody * sizes.spread(rank.cp) * rank.element
    mixed = t * sizes.heads * sizes.value * rank.element
    return {
        "q": t * sizes.heads * sizes.query * rank.element,
        "kv": t * sizes.compact * rank.element,
        "kv_all": everybody * sizes.compact * rank.element,
        "qkv": spread,
        "qkv_all": spread,
        "mixed_part": mixed,
        "mixed_all": mixed,
    }
