"""How many bytes the functions of compute instructions keep for backward, and how many more there are while one runs.

It follows `megalina/model` and `megalina/parallel/functions.py` tensor by tensor: whoever changes what a function saves changes
it here, and `tests/sim/test_memory.py` holds both against each other.

Letters: T tokens of a part, h those that a rank holds between attention and MLP, o those that it routes; N rows that it sends, R
rows that it gets; D width of the model, Q of its queries here, G of its keys; F hidden width, H what the activation reads; E
experts, K of a token; V words here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalina.config import PretrainConfig
from megalina.parameters import BYTES, padded_vocab_size
from megalina.step.program import Instruction

INT = 8  # bytes of an index
SHORTEST_BLOCKED, LONGEST_BLOCKED, QUERIES_A_BLOCK = 129, 1024, 64  # of megalina/model/attend.py, on CPU
ORDER = 3  # indices of a routed row: its token, its place, its slot
DIGESTED = 4  # indices of a routed row while it is sorted and hashed


@dataclass(frozen=True, slots=True)
class Inside:
    """Of one function."""

    kept: int = 0  # for backward, besides the values that the instruction reads
    forward: int = 0  # the most there is above what there was before, results and `kept` among it
    backward: int = 0  # the same of the mirror, results among it; what was kept counts as before until it is freed


class FunctionBytes:
    """Of one rank's compute instructions."""

    def __init__(
        self,
        config: PretrainConfig,
        axes: Mapping[str, int],
        *,
        vocab_size: int,
        skew_L: Sequence[float],
        expert_skew_L: Sequence[float],
        cuda: bool,
    ):
        self._config, self._cuda = config, cuda
        self._model, self._router, tp = config.model, config.router, config.parallel.tp
        self.w = BYTES[config.train.dtype]  # of a number
        self.f = max(self.w, 4)  # of statistics, scores and gradients of weights
        self.mixed = self.w < self.f
        self.seq_len, self.tokens = config.train.seq_len, config.train.micro_batch_size * config.train.seq_len
        self.tp, self.cut = tp, tp if config.parallel.sequence else 1
        self.d, self.k, self.e = self._model.d_model, self._router.top_k, self._model.num_experts
        self.experts_here, self._ep = self.e // axes["ep"], axes["ep"]
        self.head_dim = self._model.head_dim or self.d // self._model.num_heads
        self.heads = self._model.num_heads // tp
        self.q, self.g = self.heads * self.head_dim, self._model.num_kv_heads // tp * self.head_dim
        self.inputs = 2 if self._model.activation == "swiglu" else 1
        self.words = padded_vocab_size(vocab_size, tp) // tp
        self.padded = vocab_size < self.words * tp
        factor, chosen = self._router.capacity_factor, self._router.kind == "expert_choice"
        self._sent = self.k * ((factor or 1.0) if chosen else min(1.0, factor or 1.0))  # rows of a token
        limit = 1.0 if chosen else max(factor, 1.0) if factor else float("inf")
        self._got_over_sent_L = [min(skew, limit) if self._ep > 1 else 1.0 for skew in skew_L]
        self._fullest_L = [min(skew, limit) for skew in expert_skew_L]

    # numbers of an instruction
    def part(self, instruction: Instruction) -> int:
        return round(self.tokens * instruction.share)

    def held(self, instruction: Instruction) -> int:
        return self.part(instruction) // self.cut

    def own(self, instruction: Instruction) -> int:
        return self.part(instruction) // self.tp

    def sent(self, instruction: Instruction) -> int:
        return self._of_chunk(instruction, self.own(instruction) * self._sent)

    def got(self, instruction: Instruction) -> int:
        return self._of_chunk(instruction, self.own(instruction) * self._sent * self._got_over_sent_L[instruction.layer])

    def late(self, instruction: Instruction) -> int:
        """What the mirror of a late instruction makes for its weights: gradients of what the first matrix gave."""
        return self.got(instruction) * self.inputs * self._model.d_ff * self.w

    def late_rise(self, instruction: Instruction) -> int:
        """The most there is inside where the gradients of late weights are added."""
        hidden, got = self._model.d_ff, self.got(instruction)
        return self._most(got, instruction.layer) * hidden * self.w + self._outer(self.d, self.inputs * hidden)

    @property
    def reorders(self) -> bool:
        """Whether rows that arrive must be sorted by expert."""
        return self._ep > 1 and self.experts_here > 1

    def _of_chunk(self, instruction: Instruction, rows: float) -> int:
        return round(rows / (instruction.chunk[1] if "c" in instruction.part else 1))

    # functions
    def of(self, instruction: Instruction) -> Inside:
        """KeyError for an instruction that is not known here."""
        t, h, o, d = self.part(instruction), self.held(instruction), self.own(instruction), self.d * self.w
        rows, alone = self.sent(instruction) * d, self.tp == 1
        dense = (self._model.dense_d_ff or self.k * self._model.d_ff) // self.tp
        index = INT * self.sent(instruction)
        match instruction.name:
            case "embed":
                return self._embed(t, positions=alone)
            case "positions":
                return self._positions(h)
            case "attention" | "attention_heads":
                return self._attention(t, whole=alone)
            case "attention_norm" | "mlp_norm" | "head_norm":
                return self._norm(h)
            case "attention_residual" | "mlp_residual":
                return self._residual(h)
            case "mlp" | "mlp_hidden":
                return self._mlp(t, dense, whole=alone)
            case "shared":
                return self._mlp(o, self._model.shared_d_ff, whole=False, bias=self._model.bias)
            case "slice":
                return Inside(0, o * d, h * d)
            case "route":
                return self._route(o, self.sent(instruction), score=True, select=True)
            case "score":
                return self._route(o, 0, score=True, select=False)
            case "select":
                return self._route(o, self.sent(instruction), score=False, select=True)
            case "cut":
                return Inside(index, rows + DIGESTED * index, 2 * rows)
            case "join":
                return Inside(index, 2 * rows, rows)
            case "experts":
                return self._experts(self.got(instruction), instruction.layer, late=instruction.late)
            case "mix":
                return self._mix(o, self.sent(instruction))
            case "loss" if alone:
                return self._loss(t, norm=True)
            case "logits":
                return self._loss(t, norm=False)
            case "loss" | "loads" | "balance" | "balance_of_group":  # a few numbers a token, or fewer
                return Inside(0, 0, 0)
        raise KeyError(f"no bytes known of instruction {instruction.tag}")

    def _embed(self, t: int, *, positions: bool) -> Inside:
        looked_up = t * self.d * self.w
        placed = self._positions(t) if positions else Inside()
        forward = max(looked_up * (1 if self.tp == 1 else 2), looked_up + placed.forward if placed.forward else 0)
        return Inside(INT * t + placed.kept, forward + INT * t, max(self._gradient(self.words * self.d, self.w), placed.backward))

    def _positions(self, h: int) -> Inside:
        x, learned = h * self.d * self.w, self._model.positions == "learned"
        kept, working = self._dropout(h)
        longest = (self._model.max_positions or self.seq_len) * self.d
        return Inside(
            kept + (INT * h if learned else 0),
            (2 * x if learned else 0) + kept + working,
            (self._gradient(longest, self.w) if learned else 0) + x * (self.tp > 1),
        )

    def _gradient(self, numbers: int, made: int) -> int:
        """A weight's gradient on its way to the bucket where no product adds it there by itself."""
        return numbers * (made + self.f if self.mixed else made)

    def _outer(self, rows: int, columns: int) -> int:
        """The same of a matrix product, which adds in place where types are the same."""
        return self._gradient(rows * columns, self.w) if self.mixed else 0

    def _norm(self, rows: int) -> Inside:
        x, wide, layer = rows * self.d * self.w, rows * self.d * self.f, self._model.norm == "layernorm"
        if layer:
            return Inside(2 * rows * self.f, x, x)
        return Inside(rows * self.f, x + 2 * wide * self.mixed, x + 3 * wide if self.mixed else 2 * x)

    def _dropout(self, rows: int) -> tuple[int, int]:
        """The mask, which is kept; what there is besides at the most: random bits twice, and the result."""
        if not self._model.dropout:
            return 0, 0
        return rows * self.d * self.w, rows * self.d * (2 * INT + self.w)

    def _residual(self, rows: int) -> Inside:
        """Forward: without what is added."""
        x = rows * self.d * self.w
        kept, working = self._dropout(rows)
        return Inside(kept, x * (1 + self._model.bias) + kept + working, (2 + bool(kept)) * x)

    def _attention(self, t: int, *, whole: bool) -> Inside:
        """`whole`: with norm and residual."""
        x, q, g = t * self.d * self.w, t * self.q * self.w, t * self.g * self.w
        norm, residual = (self._norm(t), self._residual(t)) if whole else (Inside(), Inside())
        block, weights = self._scores(t)
        normed = norm.kept + x * whole
        cores = 2 * q + 2 * g + weights  # queries, keys, values, what comes of them, attention weights
        turned = self._model.positions == "rope" or self._model.qk_norm
        kept = normed + cores
        if self._model.qk_norm:
            kept += q + g
        forward = max(
            norm.forward + norm.kept,
            normed + (q + 2 * g) + (q + g) * turned,
            kept + block,
            kept + x + residual.forward,
        )
        tail = x + norm.backward - kept if whole else q + 2 * g + x - cores
        inner = q if weights > t * self.heads * self.f else 0  # its product with what came out
        backward = max(2 * q + 2 * g + max(inner, 2 * block), q + self._outer(self.d, self.q), tail)
        return Inside(kept + residual.kept, forward, backward)

    def _scores(self, t: int) -> tuple[int, int]:
        """Of attention's core: what one block needs, and what is kept beside queries, keys, values and result."""
        s, blocked = self.seq_len, SHORTEST_BLOCKED <= self.seq_len <= LONGEST_BLOCKED
        if self._cuda or self.mixed or not blocked:
            return 0, t * self.heads * self.f  # log-sum-exps
        seen = sum(min(b + QUERIES_A_BLOCK, s) * min(QUERIES_A_BLOCK, s - b) for b in range(0, s, QUERIES_A_BLOCK))
        return QUERIES_A_BLOCK * s * self.heads * self.w, t // s * self.heads * seen * self.w

    def _mlp(self, t: int, hidden: int, *, whole: bool, bias: bool = False) -> Inside:
        """`whole`: with norm and residual; `bias`: the output's is added by the function."""
        x, read = t * self.d * self.w, t * self.inputs * hidden * self.w
        norm, residual = (self._norm(t), self._residual(t)) if whole else (Inside(), Inside())
        kept = norm.kept + x * whole + read
        scratch = t * hidden * self.w
        forward = max(norm.forward + norm.kept, kept + x + max(scratch, residual.forward, x * bias))
        backward = x + 2 * scratch + read + self._products(t, self.inputs * hidden)
        return Inside(kept + residual.kept, forward, max(backward, x + norm.backward - kept if whole else 0))

    def _products(self, rows: int, read: int) -> int:
        """What gradients of an MLP's weights need: a wide copy of one, or of the rows that a bias' gradient is the sum of."""
        return max(self._outer(self.d, read), rows * read * self.f if self.mixed and self._model.bias else 0)

    def _most(self, got: int, layer: int) -> int:
        """Rows that go through one expert's matrices at once."""
        if self.experts_here == 1 or (self._cuda and self.mixed):  # grouped products take all
            return got
        return min(got, round(got / self.experts_here * self._fullest_L[layer]))

    def _experts(self, got: int, layer: int, *, late: bool) -> Inside:
        hidden, read = self._model.d_ff, self.inputs * self._model.d_ff
        x, h = got * self.d * self.w, got * read * self.w
        most = self._most(got, layer)
        kept = h + x * self.reorders
        forward = kept + x + max(most * hidden * self.w, x * self.reorders)
        first = h if late else most * read * self.w  # gradients of what the first matrix gave
        products = 0 if late else self._products(most, read)
        backward = x * (1 + self.reorders) + first + 2 * most * hidden * self.w + products
        return Inside(kept, forward, backward)

    def _route(self, o: int, sent: int, *, score: bool, select: bool) -> Inside:
        """Of `o` tokens; the router's numbers are of at least 32 bits."""
        x, wide, scores = o * self.d * self.w, o * self.d * self.f, o * self.e * self.f
        routed, hashed = self._router.kind not in ("hash",), self._router.kind == "hash"
        norm = self._norm(o) if score else Inside()
        written = self._model.shared_d_ff > 0 or self.tp > 1  # the normed tokens are a value themselves
        copied = score and routed and (self.mixed or not written)
        kept = norm.kept + wide * copied
        if select and not hashed:
            kept += (3 + 2 * (self._router.kind in ("sigmoid", "group_limited"))) * scores
        rows, order = sent * self.d * self.w, INT * sent
        normed = x if score and (self.mixed or written or hashed) else 0
        results = rows + ORDER * order + normed
        forward = max(norm.forward + norm.kept, kept + results + DIGESTED * order * select + 2 * scores)
        summed = x * select  # rows back to tokens
        through = (wide + x * self.mixed) if score and routed else 0  # the router's part of it
        tail = x + norm.backward - wide * copied if score else 0
        return Inside(kept, forward, max(summed + through + 4 * scores, tail))

    def _mix(self, o: int, sent: int) -> Inside:
        x, rows = o * self.d * self.w, sent * self.d
        kept, working = self._dropout(o)
        shared = self._model.shared_d_ff > 0
        summed = x + 2 * o * self.d * self.f * self.mixed
        forward = summed + (x if shared or kept else 0) + kept + working
        split = rows * (self.w + 3 * self.f if self.mixed else 2 * self.w)  # gradients of rows, and their products with the rows
        added = x if shared or kept else 0  # the residual's gradient is there first
        return Inside(kept, forward, max(split + added, rows * self.w + x * (1 + shared)) + (x if kept else 0))

    def _loss(self, t: int, *, norm: bool) -> Inside:
        """The largest activation: logits, in place of which their gradient comes; beside them probabilities of 32 bits."""
        x, logits, wide = t * self.d * self.w, t * self.words * self.w, t * self.words * self.f
        before = self._norm(t) if norm else Inside()
        kept = before.kept + x * norm + logits + wide * self.mixed
        # probabilities are taken in place, but where rows end in padding of a contiguous copy, and written from another
        copies = wide if self.mixed else 2 * wide if self.padded and not self._cuda else 0
        backward = x + self._outer(self.words, self.d)
        return Inside(kept, max(before.forward, kept + copies), max(backward, x + before.backward - kept if norm else 0))
