"""How many bytes one rank holds in a step, by arithmetic: its state, each value of a program, what exchanges set aside.

`InstructionBytes` is the `Sizes` that `megalina.perfmodel.sim.memory` asks.  Rows are those of routing without drops: a rank gets
as many as it sends on average, and `skew` times as many where its experts are the fullest.

`bucket_specs` are the gradient buckets that `megalina/parallel/buckets.py` builds, without a model: a program needs them, and so
does the question how large a rank is, also of models that no machine here could hold."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

from megalina.blocks.bucket_layout import ALIGNMENT, Member, lay_out_bucket
from megalina.blocks.dispatch import dispatch_of
from megalina.blocks.heads import rotary_width
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.model import blocks_of
from megalina.blocks.optimizers import matrix_flops, optimizer_of
from megalina.blocks.sizes import INT_BYTES, Rank
from megalina.config import BYTES, PretrainConfig, padded_vocab_size, training_layers
from megalina.layout import EMBEDDING, axis_of_group, axis_sizes, by_node, ranks_of, readers
from megalina.step.partition import is_part
from megalina.step.passes import ROUTER_STATE
from megalina.step.pipeline.fill import ends_of
from megalina.step.program import BucketSpec, Instruction, Op, has_gradient, most_matrices

DIRECT_BYTES = 16 * 1024  # of megalina/comm/exchange.py: what is as small is sent to each rank
FEW = (  # a number a part, an expert or a sequence: not counted
    *("#batch", "#own_loss", "#loss", "#own_divisor", "#divisor", "#own_measure", "#measured", "#verdict", ROUTER_STATE),
    *("prob", "#load", "#loads", "#all_loads", "#group", "#logit", "#own_logits", "#logits"),
)
MATRIX_ELEMENTS = 2**24  # that megalina/train/muon.py makes orthogonal at once
STREAM = re.compile(r"x|h\d*")  # values of the residual stream
PART = re.compile(r"\.\d+p\d+/(\d+)")  # of a value's name: one of so many parts of a range


def bucket_specs(
    config: PretrainConfig, world: int, *, vocab_size: int, packing: int = 1, piece_bytes: int = 0, embedding_ranks: int = 1
) -> dict[str, BucketSpec]:
    """Group -> its bucket, in the trainer's order: a group stands at its last parameter, the model's last parameter is first.
    `vocab_size`: before padding; `piece_bytes`: as in a `Plan`; `embedding_ranks`: pipeline ranks that hold the embedding."""
    train = config.train
    text = f"{config.model} {config.router} {config.parallel} {config.optim} {train.dtype} {train.seq_len}"
    return dict(_known_specs(_Asked(text, world, vocab_size, packing, piece_bytes, embedding_ranks, config)))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What buckets are of.  Configurations are compared as text of what counts here, since they may change."""

    text: str
    world: int
    vocab_size: int
    packing: int
    piece_bytes: int
    embedding_ranks: int
    config: PretrainConfig = field(compare=False)


@lru_cache(maxsize=256)
def _known_specs(asked: _Asked) -> dict[str, BucketSpec]:
    """A search asks for each layout's with every micro-batch and recompute mode."""
    config, world, vocab_size, packing = asked.config, asked.world, asked.vocab_size, asked.packing
    piece_bytes, embedding_ranks = asked.piece_bytes, asked.embedding_ranks
    tp, pipeline = config.parallel.tp, config.parallel.pp > 1
    sizes = axes_of(config, world, packing=packing, embedding_ranks=embedding_ranks)
    blocks = blocks_of(
        config.model,
        config.router,
        vocab_size=vocab_size,
        padded_vocab=padded_vocab_size(vocab_size, tp),
        max_positions=config.model.max_positions or config.train.seq_len,
    )
    kind, optim = optimizer_of(config.optim), config.optim
    members: dict[str, list[Member]] = {}
    for layer, parameter in blocks.parameters():
        group = parameter.group(layer, tp=tp > 1, pipeline=pipeline)
        whole = kind.takes_whole(parameter, optim)
        members[group] = [*members.pop(group, []), Member(parameter, parameter.local_shape(sizes), whole)]
    out = {}
    for group, of_group in reversed(members.items()):
        axis = axis_of_group(group, pipeline=pipeline, shared_embedding=embedding_ranks > 1)
        sharded = config.parallel.zero == 1 and sizes[axis] > 1
        layout = lay_out_bucket(
            group,
            of_group,
            ranks=sizes[axis] if sharded else 1,
            tp=tp if optim.muon_tp == "gather" else 1,
            matrix_work=partial(matrix_flops, config=optim),
        )
        grain = ALIGNMENT * (sizes[axis] if sharded and not layout.shares else 1)
        piece = piece_bytes // max(BYTES[config.train.dtype], 4)
        size = max(grain, piece // grain * grain) if piece else None
        out[group] = BucketSpec(layout.numel, axis, sharded, size, layout.matrices, layout.shares)
    return out


def axes_of(config: PretrainConfig, world: int, *, packing: int = 1, embedding_ranks: int = 1) -> dict[str, int]:
    """Ranks along each axis, with pipelines also of a stage and of the ranks that hold the embedding.

    ValueError where the layout does not fit the world."""
    parallel = config.parallel
    sizes = axis_sizes(world // parallel.pp, tp=parallel.tp, ep=parallel.ep, cp=parallel.cp, packing=packing)
    if parallel.pp == 1:
        return sizes
    return sizes | {"world": world, "stage": sizes["world"], EMBEDDING: sizes["dp"] * embedding_ranks}


class InstructionBytes:
    """Of one rank; all ranks are taken to be alike, but for what pipeline ranks hold (`of_buckets`)."""

    def __init__(
        self,
        config: PretrainConfig,
        world: int,
        *,
        vocab_size: int,
        skew: float | Sequence[float] = 1.0,
        expert_skew: float | Sequence[float] | None = None,
        packing: int = 1,
        piece_bytes: int = 0,
        cuda: bool = False,
        embedding_ranks: int = 1,
        ranks_per_node: int = 0,
    ):
        """`vocab_size`: before padding; `skew`: rows that the rank gets over the mean; `expert_skew`: rows of its fullest expert
        over the mean of its experts, None: as `skew`; both of all layers, or of each layer; `packing`, `piece_bytes`: of the
        `Plan`; `cuda`: kernels and NCCL instead of the CPU's and gloo; `embedding_ranks`: as of `bucket_specs`;
        `ranks_per_node`: gradients are summed by node; 0: flat.
        ValueError for a skew that is none, and where the layout does not fit the world."""
        self._config, self._cuda, self._ranks_per_node = config, cuda, ranks_per_node
        self.axes = axes_of(config, world, packing=packing, embedding_ranks=embedding_ranks)
        self.buckets: Mapping[str, BucketSpec] = bucket_specs(
            config,
            world,
            vocab_size=vocab_size,
            packing=packing,
            piece_bytes=piece_bytes,
            embedding_ranks=embedding_ranks,
        )
        layers = len(training_layers(config.model))
        skew_L = _of_layers("skew", skew, layers)
        expert_skew_L = skew_L if expert_skew is None else _of_layers("expert_skew", expert_skew, layers)
        tp, rows = config.parallel.tp, padded_vocab_size(vocab_size, config.parallel.tp)
        self.rank = Rank(
            config=config,
            ep=self.axes["ep"],
            vocab_rows=rows,
            padded=vocab_size < rows,
            skew_L=skew_L,
            expert_skew_L=expert_skew_L,
            cuda=cuda,
        )
        self.blocks = blocks_of(
            config.model,
            config.router,
            vocab_size=vocab_size,
            padded_vocab=padded_vocab_size(vocab_size, tp),
            max_positions=config.model.max_positions or config.train.seq_len,
            dispatch=dispatch_of(config, packing),
        )

    def of_buckets(self, names: Collection[str]) -> "InstructionBytes":
        """Of a rank that holds these buckets alone, as a pipeline rank does."""
        out = copy(self)
        out.__dict__.pop("state", None)
        out.buckets = {name: spec for name, spec in self.buckets.items() if name in names}
        return out

    @cached_property
    def _few(self) -> frozenset[str]:
        return frozenset(FEW) | {value for loss in self.blocks.losses for value in loss.values}

    @cached_property
    def state(self) -> Mapping[str, int]:
        """What is there throughout."""
        train, rank = self._config.train, self.rank
        numel = sum(spec.numel for spec in self.buckets.values())
        own, moments = self._owned()
        tokens = train.global_batch_size // readers(self.axes) * train.seq_len  # each rank of cp knows whole sequences
        rope = rotary_width(self._config.model)  # cosines and sines, half each
        table = (self._config.model.max_positions or train.seq_len) * rope * 8
        return {
            "weights": numel * rank.element,
            "gradients": numel * rank.main,
            "master weights": own * rank.main if rank.mixed else 0,
            "moments": moments * rank.main,
            # tokens, labels, positions, two masks; what layers find out once: samples, places, groups, RoPE's rows; of each layer
            # of multi-token prediction tokens, labels and a mask
            "batches": tokens * (6 * INT_BYTES + 2 + rope * rank.element + self._config.model.mtp_layers * (2 * INT_BYTES + 1))
            + table,
        }

    def _owned(self) -> tuple[int, int]:
        """Elements that are updated, and numbers that are kept of them, by the ranks of each axis that have the most."""
        kind = optimizer_of(self._config.optim)
        everywhere, uneven = [0, 0], defaultdict[tuple[str, int], list[int]](lambda: [0, 0])
        for bucket in self.buckets.values():
            shares = bucket.shares or ((0, bucket.owned(self.axes[bucket.axis])),)
            for rank, (start, stop) in enumerate(shares):
                if start < stop:
                    matrices = sum(m.count * m.numel for m in bucket.own_matrices(rank))
                    of = uneven[bucket.axis, rank] if bucket.shares else everywhere
                    of[0] += stop - start
                    of[1] += len(kind.states) * (stop - start - matrices) + len(kind.matrix_states) * matrices
        most = [everywhere, *(max(of for (a, _), of in uneven.items() if a == axis) for axis in {axis for axis, _ in uneven})]
        return sum(of[0] for of in most), sum(of[1] for of in most)

    def ranks(self, axis: str) -> int:
        """Between two pipeline ranks there are two."""
        return self.axes.get(axis) or len(ends_of(axis))

    def kept(self, instruction: Instruction) -> int:
        """What a forward instruction keeps for its mirror, besides the values that it reads."""
        return self._memory(instruction).kept

    def keeps(self, instruction: Instruction) -> tuple[str, ...]:
        """Those of its results that a forward instruction keeps, too."""
        return tuple(self.blocks.block_of(instruction).keeps(self.rank.shapes(instruction)))

    def deferred(self, instruction: Instruction) -> Deferred:
        """What waits for the gradients of the weights of an instruction of backward, or of what adds them."""
        return self.blocks.block_of(instruction).deferred(self.rank.shapes(instruction))

    def kept_back(self, instruction: Instruction) -> int:
        """By an instruction of backward for its weights' gradients: its own, and the values that wait with them."""
        of = self.deferred(instruction)
        reads = [v.rstrip("'") for v in instruction.writes if has_gradient(v)] if of.reads else []
        gradients = [v for v in instruction.reads if has_gradient(v)] if of.gradients else []
        return of.kept + sum(self.value(v, instruction) for v in (*reads, *gradients))

    def rise(self, instruction: Instruction) -> int:
        """The most there is inside a compute instruction above what there was before, its results among it."""
        if instruction.phase == "U":
            return self._orthogonal(instruction) if instruction.name.startswith("newton_schulz ") else 0
        if instruction.phase == "W":
            return self.deferred(instruction).rise
        of = self._memory(instruction)
        if instruction.phase == "F":
            return of.forward
        if not instruction.recompute:
            return of.backward
        results = sum(
            self.value(v, instruction) for v in instruction.reads if has_gradient(v)
        )  # as many as their gradients, which are read
        return max(of.forward, of.kept + results + of.backward)

    def bucket(self, instruction: Instruction) -> int:
        """What is set aside to send a piece of a bucket."""
        spec, elements = self.buckets[instruction.buckets[0]], instruction.piece[1] - instruction.piece[0]
        if inside := self._inside(spec.axis):  # `megalina.comm.by_node`: the stage that holds most
            element = self.rank.element if instruction.op is Op.PARAMS else self.rank.main
            return (elements * (2 if spec.sharded else 1) + elements // inside) * element
        if not spec.sharded:
            return 0  # it is summed where it is
        if spec.shares:  # of each piece as large a share as the rank with the most of the bucket has; on gloo for all ranks
            share = elements * spec.owned(len(spec.shares)) // spec.numel * (1 if self._cuda else len(spec.shares))
            return share * (self.rank.element if instruction.op is Op.PARAMS else self.rank.main)
        share = elements // self.axes[spec.axis]
        if instruction.op is Op.PARAMS:
            return share * self.rank.element  # a copy of what this rank has
        return (share if self._cuda else elements) * self.rank.main  # on gloo all ranks' shares, summed here

    def _inside(self, axis: str) -> int:
        """Ranks of a row on each node, where gradients are summed by node along it; else 0."""
        if not self._ranks_per_node:
            return 0
        of_stage = {"stage": "world", EMBEDDING: "dp"}.get(axis, axis)  # of one, and of several what is at hand
        nodes = by_node(ranks_of(self.axes)(of_stage, 0), self._ranks_per_node)
        return len(nodes[0]) if nodes else 0

    def received(self, instruction: Instruction, sent: int, arrives: int) -> int:
        """The buffer for what arrives, beside what is sent."""
        if instruction.op is Op.SUM or (instruction.op is Op.SCATTER and not self._cuda):
            return sent
        direct = instruction.op is Op.GATHER and sent <= DIRECT_BYTES and not self._cuda
        return arrives + (sent * self.axes[instruction.axis] if direct else 0)

    def value(self, name: str, instruction: Instruction) -> int:
        """Of a value that `instruction` reads or writes.  KeyError for one that is not known here."""
        rank = self.rank
        head = name.partition(".")[0].rstrip("'")
        if name.startswith("#late "):
            return self.deferred(instruction).kept
        if " " in name:
            return self._of_matrices(*name.split(" ")) if name.startswith("#") else 0  # buckets are state
        if head in self._few:
            return 0
        at = rank.shapes(instruction)
        of_part = PART.search(name) if not is_part(instruction) else None
        parts = int(of_part[1]) if of_part else 1  # of what is cut, or made of parts
        if STREAM.fullmatch(head):
            return int(at.held) * rank.width * rank.element // parts
        whole = "c" not in name.rpartition(".")[2] and "c" not in instruction.part  # of all chunks together
        chunks = 1 if whole or "c" in instruction.part else instruction.chunk[1]
        known = self.blocks.block_of(instruction).value_bytes(at)
        if head not in known:
            raise KeyError(f"no bytes known of value {name} of instruction {instruction.tag}")
        return known[head] // chunks // parts

    def _of_matrices(self, value: str, name: str) -> int:
        """Of directions, and of what they are made of where tp cuts matrices."""
        own = most_matrices(self.buckets[name])
        whole = sum(m.count * m.numel for m in own) * self.rank.main
        cut = sum(m.count * m.numel for m in own if m.cut >= 0) * self.rank.main
        told = cut * self.rank.tp
        if self._config.strategy.newton_schulz_after and self._config.optim.clip_norm:  # gradients and momenta
            cut, told, whole = 2 * cut, 2 * told, whole + 2 * told  # what directions are made of stays until the update
        return {"#direction": whole, "#momentum": cut, "#whole": told}[value]

    def _orthogonal(self, instruction: Instruction) -> int:
        """What Newton-Schulz needs above directions: what it is made of, and twice the matrix and its products with itself, of so
        many at a time."""
        spec = self.buckets[instruction.name.removeprefix("newton_schulz ")]
        narrow = 2 if self._config.optim.muon_dtype == "bfloat16" else self.rank.main
        most = 0
        for m in most_matrices(spec):
            sides = [m.rows * (self.rank.tp if m.cut == 0 else 1), m.columns * (self.rank.tp if m.cut == 1 else 1)]
            short, numel = min(sides), sides[0] * sides[1]
            some = min(m.count, max(1, MATRIX_ELEMENTS // numel))
            most = max(most, 2 * m.count * numel * self.rank.main + some * (2 * numel + 2 * short * short) * narrow)
        return most + self.value(instruction.writes[0], instruction)

    def _memory(self, instruction: Instruction) -> Inside:
        return self.blocks.block_of(instruction).memory(self.rank.shapes(instruction))


def _of_layers(name: str, skew: float | Sequence[float], layers: int) -> Sequence[float]:
    """Of each layer; ValueError where a number is missing or makes no sense."""
    skew_L = [float(skew)] * layers if isinstance(skew, int | float) else list(skew)
    if len(skew_L) != layers:
        raise ValueError(f"{name} has {len(skew_L)} numbers: give one, or one for each of {layers} layers")
    if bad := [s for s in skew_L if not 0 < s < float("inf")]:
        raise ValueError(f"{name} is {bad[0]}: it is rows over their mean; give a number above 0, 1 for even routing")
    return skew_L
