"""What each compute instruction of a program asks of a device: matrix products, bytes in device memory, kernels.

Blocks say what their instructions ask; here is what opens and closes a step.  Numbers from the configuration alone; routing is
even.  Model FLOPs are counted, as for MFU: what is computed again counts where the program says so (`recompute`), not where a
kernel does it by itself.  Passes over memory and kernels are those of `megalina/model` on a GPU, where attention is one kernel,
and so is each product of all experts in bfloat16.  Biases, dropout and padding are left out.
"""

from collections.abc import Mapping

from megalina.blocks.dispatch import dispatch_of
from megalina.blocks.heads import model_of_layer
from megalina.blocks.model import Blocks, blocks_of, context_of
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.sizes import Rank
from megalina.blocks.work import Piece, Product, Work, small
from megalina.config import PretrainConfig
from megalina.layout import EMBEDDING
from megalina.step.forward import plain
from megalina.step.passes import ROUTER_STATE
from megalina.step.program import BucketSpec, Instruction, Kind, most_matrices

# Kernels of an instruction whose tensors are small: what it takes is launches.  Counted in megalina/parallel/functions.py.
SMALL = {"sizes": 8, "sizes_of_group": 4, "seed": 8, "verdict": 4, "evaluated": 4}
BIAS_KERNELS = 7  # a MoE layer: its load comes from the host and is widened; mean, difference, sign, narrowed, added
MATRIX_KERNELS = 4  # an update of matrices that are alike: momentum and weights, each multiplied and added to
DELTA_KERNELS = 6  # a MoE layer: what is known or not, old and new, their sum, copied


class InstructionWork:
    """`work(instruction)`: Work() for instructions that send or wait.

    `world`: ranks, with pipelines of all stages; `vocab_rows`: of the output matrix, padding included, over all ranks;
    `buckets`: those of the program; `packing`: times as many experts on a rank as parallel.ep says; `embedding_ranks`: pipeline
    ranks that hold the embedding.  ValueError for an instruction that no strategy makes.
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        world: int,
        vocab_rows: int,
        buckets: Mapping[str, BucketSpec],
        packing: int = 1,
        embedding_ranks: int = 1,
    ):
        ep = config.parallel.ep / packing
        self.config, self.buckets = config, buckets
        self.rank = Rank(config=config, ep=ep, vocab_rows=vocab_rows)
        positions, dispatch = config.train.seq_len, dispatch_of(config, packing)
        self.blocks: Blocks = blocks_of(config.model, config.router, max_positions=positions, dispatch=dispatch)
        stage = world // config.parallel.pp
        dp = stage / self.rank.tp
        # ranks that hold the same parameters
        self.copies = {"world": stage, "stage": stage, "dp": dp, "copies": stage / ep, EMBEDDING: dp * embedding_ranks}

    def __call__(self, instruction: Instruction, load: float = 1.0) -> Work:
        """`load`: rows of the experts here as a multiple of the mean."""
        if instruction.kind is not Kind.COMPUTE:
            return Work()
        if instruction.phase == "U":
            return self._without_autograd(instruction)
        piece = self.piece(instruction, load)
        if instruction.phase == "F":
            return piece.forward
        if instruction.phase == "W":
            return piece.weights
        again = piece.forward if instruction.recompute else Work()
        return again + piece.backward + (Work() if instruction.late else piece.weights)

    def alike(self, instruction: Instruction) -> int:
        """The same for instructions of layers that cost the same: those of one name differ by attention's window alone."""
        return model_of_layer(self.config.model, instruction.layer).window

    def piece(self, instruction: Instruction, load: float = 1.0) -> Piece:
        """What a forward instruction and all that follows from it ask.  ValueError for one that no block has."""
        try:
            block = self.blocks.block_of(instruction)
        except KeyError:
            raise ValueError(f"{instruction.tag}: what this instruction costs isn't known, for no block has it") from None
        return block.work(self.rank.at(instruction, load=load))

    # without autograd
    def _without_autograd(self, instruction: Instruction) -> Work:
        what, _, of = instruction.name.partition(" ")
        if of:
            by_name = {"update": self._update, "momentum": self._momentum, "newton_schulz": self._newton_schulz}
            return by_name[what](self.buckets[of])
        if instruction.name == "measure":  # squares of gradients
            names = [v.removesuffix("'sum") for v in instruction.reads if v.endswith("'sum")]
            return Work((), sum(self._here(self.buckets[n]) for n in names) * self.rank.main, 8 + 2 * len(names))
        if instruction.name == ROUTER_STATE:
            kernels = BIAS_KERNELS if self.config.router.capacity_bound == "none" else DELTA_KERNELS  # never both
            return small(kernels * sum(self.blocks.moe))
        if instruction.name == "head_logits":
            return small(2 * len(instruction.reads) + 2)
        if instruction.name not in SMALL:
            raise ValueError(f"{instruction.tag}: what this instruction costs isn't known; add it to `SMALL` here")
        return small(SMALL[instruction.name])

    def _update(self, bucket: BucketSpec) -> Work:
        """What the optimizer reads and writes, of AdamW gradient, weight and two moments and the last three; then the gradients
        are cleared."""
        rank, kind = self.rank, optimizer_of(self.config.optim)
        copied = (rank.main + rank.element) * (rank.element != rank.main)  # master weights to weights
        own = most_matrices(bucket)
        matrices = bucket.busy * sum(m.count * m.numel for m in own)
        passes = kind.passes * (self._here(bucket) - matrices) + kind.matrix_passes * matrices
        moved = passes * rank.main + self._here(bucket) * copied + bucket.numel * rank.main
        return Work((), moved, 2 + bucket.busy * MATRIX_KERNELS * len(own) + (rank.element != rank.main))

    def _momentum(self, bucket: BucketSpec) -> Work:
        """Of matrices that tp cuts: found, and put side by side."""
        cut = [m for m in most_matrices(bucket) if m.cut >= 0]
        return Work((), 8 * bucket.busy * sum(m.count * m.numel for m in cut) * self.rank.main, 4 * len(cut) + 1)

    def _newton_schulz(self, bucket: BucketSpec) -> Work:
        """The products of the rank that has the most, and what is read and written before and after them; where some ranks have
        none, as many of them as come to a rank over all layers."""
        optim, rank = self.config.optim, self.rank
        element = 2 if optim.muon_dtype == "bfloat16" else rank.main
        products, moved, kernels = list[Product](), 0.0, 0
        for m in most_matrices(bucket):
            rows, columns = m.rows * (rank.tp if m.cut == 0 else 1), m.columns * (rank.tp if m.cut == 1 else 1)
            for r, c, d in optimizer_of(optim).matrix_products(rows, columns, optim):
                count = bucket.busy * m.count
                num_bytes = (r * d + d * c + 2 * r * c) * count * element  # what is multiplied by a coefficient is read, too
                products.append(Product(r, c, d, count, num_bytes, wide=rank.mixed and element != 2))
            moved += bucket.busy * m.count * rows * columns * (5 * rank.main + 5 * element + 3 * rank.main)
            kernels += 10
        return Work(tuple(products), moved, kernels)

    def _here(self, bucket: BucketSpec) -> float:
        """Elements that this rank updates; of whole matrices on average over layers."""
        if bucket.shares:
            return bucket.busy * bucket.owned(len(bucket.shares))
        return bucket.numel / (self.copies[bucket.axis] if bucket.sharded else 1)


def forward_flops(config: PretrainConfig) -> dict[str, float]:
    """Of a whole micro-batch's forward on one rank, by instruction: of those that an emulated device computes.  The mean over
    layers, where some have a window."""
    return {name: sum(p.forward.flops for p in pieces) / len(pieces) for name, pieces in _emulated_pieces(config).items()}


def weight_shares(config: PretrainConfig) -> dict[str, float]:
    """Of the same instructions: FLOPs of the products that give weights' gradients over those of forward.  1 where all of it are
    products with weights; what attention does beside them has no weights."""
    sums = {
        name: (sum(p.weights.flops for p in pieces), sum(p.forward.flops for p in pieces))
        for name, pieces in _emulated_pieces(config).items()
    }
    return {name: weights / forward for name, (weights, forward) in sums.items() if forward}


def newton_schulz_flops(config: PretrainConfig, buckets: Mapping[str, BucketSpec]) -> dict[str, float]:
    """Of one rank's directions, by instruction: of the buckets that have matrices; as `InstructionWork` says."""
    work = InstructionWork(config, world=1, vocab_rows=config.model.vocab_size, buckets=buckets)
    names = [f"newton_schulz {bucket}" for bucket, spec in buckets.items() if spec.matrices]
    return {name: work(Instruction("U", Kind.COMPUTE, name)).flops for name in names}


def _emulated_pieces(config: PretrainConfig) -> dict[str, list[Piece]]:
    """Of each layer that has the instruction."""
    work = InstructionWork(config, world=1, vocab_rows=config.model.vocab_size, buckets={})
    parallel = config.parallel
    shape = work.blocks.shape(tp=parallel.tp, sequence=parallel.sequence, context=context_of(parallel))
    out: dict[str, list[Piece]] = {}
    for instruction in plain(shape):
        if instruction.kind is Kind.COMPUTE and instruction.name in work.blocks.block_of(instruction).emulated:
            out.setdefault(instruction.name, []).append(work.piece(instruction))
    return out
