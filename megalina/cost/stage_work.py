"""What each compute instruction of a program asks of a device: matrix products, bytes in device memory, kernels.

Numbers from the configuration alone; routing is even.  Model FLOPs are counted, as for MFU: what is computed again counts
where the program says so (`recompute`), not where a kernel does it by itself.  Passes over memory and kernels are those of
`megalina/model` on a GPU, where attention is one kernel, and so is each product of all experts in bfloat16.  Biases, dropout and
padding are left out.
"""

from collections.abc import Mapping

from megalina.config import PretrainConfig
from megalina.cost.work import Piece, Product, Work, small
from megalina.parameters import BYTES, is_moe_layer
from megalina.step.passes import ROUTER_BIAS
from megalina.step.program import BucketSpec, Instruction, Kind

# Kernels of an instruction whose tensors are small: what it takes is launches.  Counted in megalina/parallel/functions.py.
SMALL = {
    **{"sizes": 8, "sizes_of_group": 4, "seed": 8, "verdict": 4, "evaluated": 4},
    **{"loads": 1, "balance": 12, "balance_of_group": 14},
}
BIAS_KERNELS = 7  # a MoE layer: its load comes from the host and is widened; mean, difference, sign, narrowed, added
SELECT_KERNELS = 45  # forward; counted in megalina/model/routers.py, balance.py and permute.py
SELECT_PASSES = (12, 8)  # over the logits, forward and backward


class StageWork:
    """`work(instruction)`: Work() for instructions that send or wait.

    `world`: ranks; `vocab_rows`: of the output matrix, padding included, over all ranks; `buckets`: those of the program;
    `packing`: times as many experts on a rank as parallel.ep says.  ValueError for an instruction that no strategy makes.
    """

    def __init__(
        self, config: PretrainConfig, *, world: int, vocab_rows: int, buckets: Mapping[str, BucketSpec], packing: int = 1
    ):
        model, tp = config.model, config.parallel.tp
        self.config, self.model, self.tp, self.buckets = config, model, tp, buckets
        self.element = BYTES[config.train.dtype]
        self.main = max(self.element, 4)  # bytes of gradients, master weights and moments, and of what routers compute with
        self.words = vocab_rows / tp
        ep = config.parallel.ep / packing
        self.local_experts = model.num_experts / ep
        self.regroups = ep > 1 and self.local_experts > 1  # rows arrive sorted by rank
        self.copies = {"world": world, "dp": world / tp, "copies": world / ep}  # ranks that hold the same parameters
        self.head_dim = model.head_dim or model.d_model // model.num_heads
        self.hidden_in = 2 if model.activation == "swiglu" else 1  # numbers that the activation reads for each that it gives

    def __call__(self, instruction: Instruction, load: float = 1.0) -> Work:
        """`load`: rows of the experts here as a multiple of the mean."""
        if instruction.kind is not Kind.COMPUTE:
            return Work()
        if instruction.phase == "U":
            return self._without_autograd(instruction)
        piece = self._piece(instruction, load)
        if instruction.phase == "F":
            return piece.forward
        if instruction.phase == "W":
            return piece.weights
        again = piece.forward if instruction.recompute else Work()
        return again + piece.backward + (Work() if instruction.late else piece.weights)

    def _piece(self, instruction: Instruction, load: float) -> Piece:
        train, tokens = self.config.train, instruction.share * self.config.train.micro_batch_size * self.config.train.seq_len
        own = tokens / self.tp
        held = own if self.config.parallel.sequence else tokens  # with activations between attention and MLP
        rows = own * self.config.router.top_k
        match instruction.name:
            case "embed":
                return self._embed(tokens) + (self._positions(tokens) if self.tp == 1 else Piece())
            case "positions":
                return self._positions(held)
            case "attention":
                return self._norm(tokens) + self._heads(tokens, train.seq_len) + self._residual(tokens)
            case "attention_heads":
                return self._heads(tokens, train.seq_len)
            case "mlp":
                return self._norm(tokens) + self._mlp(tokens, self._dense_d_ff() / self.tp) + self._residual(tokens)
            case "mlp_hidden":
                return self._mlp(tokens, self._dense_d_ff() / self.tp)
            case "attention_norm" | "mlp_norm" | "head_norm":
                return self._norm(held)
            case "attention_residual" | "mlp_residual":
                return self._residual(held)
            case "route":
                return self._score(own) + self._select(own, tokens)
            case "slice":
                return self._moved(2 * own, own + tokens, 1, 2)
            case "score":
                return self._score(own)
            case "select":
                return self._select(own, tokens)
            case "shared":
                return self._mlp(own, self.model.shared_d_ff)
            case "cut" | "join":
                return self._moved(2 * rows, 2 * rows, 2, 2)
            case "experts":
                return self._experts(load * rows / instruction.chunk[1])
            case "mix":
                return self._mix(own, rows)
            case "logits":
                return self._head(tokens)
            case "loss":
                return self._norm(tokens) + self._head(tokens) if self.tp == 1 else Piece(small(8), small(8))
            case name if name in SMALL:
                return Piece(small(SMALL[name]), small(SMALL[name]))
        raise ValueError(f"{instruction.tag}: what this instruction costs isn't known; add it to megalina/cost/stage_work.py")

    # pieces of instructions
    def _moved(self, forward: float, backward: float, kernels: float, kernels_back: float) -> Piece:
        """Kernels that read and write so many rows of the model's width."""
        row_bytes = self.model.d_model * self.element
        return Piece(Work((), forward * row_bytes, kernels), Work((), backward * row_bytes, kernels_back))

    def _linear(self, rows: float, columns: float, inner: float, *, count: float = 1, wide: bool = False) -> Piece:
        """[rows, inner] times a weight of [columns, inner], `count` times with other weights, in one kernel each way."""
        element = self.main if wide else self.element
        weight, sides = columns * inner * count, (rows * inner + rows * columns) * count
        both = (sides + weight) * element
        adds = Work()
        to_main = 2 * weight * self.main  # the product itself adds to the gradients ...
        if element != self.main:  # ... unless they are wider
            adds, to_main = Work((), weight * (element + 2 * self.main), 1), weight * element
        return Piece(
            Work((Product(rows, columns, inner, count, both, wide),)),
            Work((Product(rows, inner, columns, count, both, wide),)),
            Work((Product(columns, inner, rows, count, sides * element + to_main, wide),)) + adds,
        )

    def _norm(self, tokens: float, width: float = 0) -> Piece:
        """RMSNorm is made of several kernels, LayerNorm of one."""
        numbers = tokens * (width or self.model.d_model)
        if self.model.norm == "layernorm" and not width:
            return Piece(Work((), 2 * numbers * self.element, 1), Work((), 3 * numbers * self.element, 3))
        narrow = self.element != self.main
        casts = numbers * (self.element + self.main) * narrow
        return Piece(
            Work((), 5 * numbers * self.main + 2 * casts, 7 + 2 * narrow),
            Work((), 15 * numbers * self.main + 3 * casts, 9 + 3 * narrow),
        )

    def _residual(self, tokens: float) -> Piece:
        """Backward: the gradients of both branches are added."""
        return self._moved(3 * tokens, 3 * tokens, 1, 1)

    def _embed(self, tokens: float) -> Piece:
        return self._moved(2 * tokens, 2 * tokens * (1 + self.main / self.element), 1, 2)

    def _positions(self, tokens: float) -> Piece:
        if self.model.positions != "learned":
            return Piece()
        return self._moved(5 * tokens, 2 * tokens * (1 + self.main / self.element), 2, 2)

    def _heads(self, tokens: float, seq_len: int) -> Piece:
        model, d, size = self.model, self.model.d_model, self.head_dim
        heads, groups = model.num_heads / self.tp, model.num_kv_heads / self.tp
        q, kv = heads * size, groups * size
        out = self._linear(tokens, q, d) + self._linear(tokens, kv, d) + self._linear(tokens, kv, d) + self._linear(tokens, d, q)
        if model.positions == "rope":
            turned_bytes = 5 * tokens * (q + kv) * self.element
            out += Piece(Work((), turned_bytes, 8), Work((), turned_bytes, 8))
        if model.qk_norm:
            out += self._norm(tokens * heads, size) + self._norm(tokens * groups, size)
        sequences = tokens / seq_len
        # Two products, queries with keys and weights with values, of which the mask leaves a half: together one whole.
        one = Product(seq_len, size, seq_len, sequences * heads, tokens * 2 * (q + kv) * self.element, attention=True)
        two = Product(seq_len, size, seq_len, 2 * sequences * heads, tokens * 4 * (q + kv) * self.element, attention=True)
        return out + Piece(Work((one,)), Work((two,)))

    def _dense_d_ff(self) -> int:
        return self.model.dense_d_ff or self.config.router.top_k * self.model.d_ff

    def _mlp(self, rows: float, d_ff: float, *, count: float = 1) -> Piece:
        """`count`: experts that have so many rows each, and share their kernels."""
        first = self._linear(rows, self.hidden_in * d_ff, self.model.d_model, count=count)
        second = self._linear(rows, self.model.d_model, d_ff, count=count)
        return first + self._activation(rows * d_ff * count) + second

    def _activation(self, numbers: float) -> Piece:
        number_bytes = numbers * self.element
        if self.model.activation == "swiglu":
            return Piece(Work((), 5 * number_bytes, 2), Work((), 14 * number_bytes, 5))
        return Piece(Work((), 2 * number_bytes, 1), Work((), 5 * number_bytes, 2))

    def _experts(self, rows: float) -> Piece:
        """All experts here in one kernel where the grouped product runs; else kernels of their own for each."""
        model, local, cpu = self.model, self.local_experts, self.config.cluster.hardware.host_is_device
        grouped = self.config.train.dtype == "bfloat16" and not cpu and model.d_model % 8 == 0 and model.d_ff % 8 == 0
        one = self._mlp(rows / local, model.d_ff, count=local if grouped else 1)
        out = one if grouped else one.repeated(round(local))
        return out + (self._moved(4 * rows, 4 * rows, 2, 2) if self.regroups else Piece())

    def _score(self, tokens: float) -> Piece:
        """The norm, and the router's logits, which are at least float32."""
        cast_bytes = tokens * self.model.d_model * (self.element + self.main) * (self.element != self.main)
        cast = Work((), cast_bytes, int(cast_bytes > 0))
        gate = self._linear(tokens, self.model.num_experts, self.model.d_model, wide=self.element < self.main)
        return self._norm(tokens) + (gate + Piece(cast, cast) if self.config.router.kind != "hash" else Piece())

    def _select(self, own: float, tokens: float) -> Piece:
        """Choices of experts, losses, the rows' order, and the rows."""
        rows, logit_bytes = own * self.config.router.top_k, self.model.num_experts * self.main
        forward, backward = (own * passes * logit_bytes for passes in SELECT_PASSES)
        forward += 2 * tokens * logit_bytes + rows * 8 * 10  # the best of all tokens' logits; sorted int64
        order = Piece(Work((), forward, SELECT_KERNELS), Work((), backward, SELECT_KERNELS / 2))
        return order + self._moved(2 * rows, rows + own, 1, 1)

    def _mix(self, own: float, rows: float) -> Piece:
        """Each token's rows by weight, on top of the residual; router's weights are at least float32."""
        if self.element == self.main:
            out = self._moved(rows + 4 * own, 8 * rows, 2, 6)
        else:
            wider = self.main / self.element
            out = self._moved(rows * (3 + 4 * wider) + own * (1 + 3 * wider), rows * (8 + 6 * wider), 3 * rows / own, 9)
        return out + (self._residual(own) if self.model.shared_d_ff else Piece()) + self._moved(0, 3 * own, 0, 1)

    def _head(self, tokens: float) -> Piece:
        """Logits, and their cross entropy in at least float32, in one memory if the model's type is."""
        numbers, element, wide = tokens * self.words, self.element, self.main
        forward = numbers * (element + 2 * element + wide)
        backward = numbers * (2 * wide + (wide + element) * (wide != element))
        return self._linear(tokens, self.words, self.model.d_model) + Piece(Work((), forward, 10), Work((), backward, 5))

    # without autograd
    def _without_autograd(self, instruction: Instruction) -> Work:
        if instruction.name.startswith("update "):
            return self._update(self.buckets[instruction.name.removeprefix("update ")])
        if instruction.name == "measure":  # squares of gradients
            names = [v.removesuffix("'sum") for v in instruction.reads if v.endswith("'sum")]
            return Work((), sum(self._here(self.buckets[n]) for n in names) * self.main, 8 + 2 * len(names))
        if instruction.name == ROUTER_BIAS:
            return small(BIAS_KERNELS * sum(is_moe_layer(self.model, i) for i in range(self.model.num_layers)))
        if instruction.name not in SMALL:
            raise ValueError(f"{instruction.tag}: what this instruction costs isn't known; add it to megalina/cost/stage_work.py")
        return small(SMALL[instruction.name])

    def _update(self, bucket: BucketSpec) -> Work:
        """AdamW reads gradient, weight and two moments and writes the last three; then the gradients are cleared."""
        passes = 7 if self.config.optim.name == "adamw" else 3
        copied = (self.main + self.element) * (self.element != self.main)  # master weights to weights
        moved = self._here(bucket) * (passes * self.main + copied) + bucket.numel * self.main
        return Work((), moved, 2 + (self.element != self.main))

    def _here(self, bucket: BucketSpec) -> float:
        """Elements that this rank updates."""
        return bucket.numel / (self.copies[bucket.axis] if bucket.sharded else 1)


def forward_flops(config: PretrainConfig) -> dict[str, float]:
    """Of a whole micro-batch's forward on one rank, by the instruction in which nearly all of it is done."""
    work = StageWork(config, world=1, vocab_rows=config.model.vocab_size, buckets={})
    names = ("attention_heads", "mlp_hidden", "experts", "shared", "logits")
    flops = {name: work(Instruction("F", Kind.COMPUTE, name, 0)).flops for name in names}
    twins = {"attention": "attention_heads", "mlp": "mlp_hidden", "loss": "logits"}
    return flops | {name: flops[twin] for name, twin in twins.items()}
