"""A mixture of experts behind a norm and beside a residual: score, select, dispatch, experts, combine, mix, shared experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalina.blocks import memory, work
from megalina.blocks.activation import activation_of
from megalina.blocks.block import Block, Loss, norm_parameters, output_std
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.mlp import mlp_parameters
from megalina.blocks.parameter import Parameter
from megalina.blocks.routers import RouterKind, kind_of
from megalina.blocks.sizes import INT_BYTES, At, Rank
from megalina.blocks.work import Piece, Work, linear, moved, norm, residual
from megalina.reference import load
from megalina.step.forward import Shape, compute, exchange, names
from megalina.step.program import Instruction, Op

SELECT_KERNELS = 45  # forward; counted in megalina/model/routers.py, balance.py and permute.py
SELECT_PASSES = (12, 8)  # over the logits, forward and backward
ORDER = 3  # indices of a routed row: its token, its place, its slot
OUR_LOSSES = ("balance_loss", "aux_loss", "z_loss", "locality_loss", "mutual_information_loss")
DIGESTED = 4  # indices of a routed row while it is sorted and hashed


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """An auxiliary loss of your own, of each MoE layer's router, named in `router.losses=[folder/file.py:Name]`.

    `functions` points to `loss(logits_TE, expert_TK, valid_T) -> scalar`, a sum over the own valid tokens (T own tokens, E
    experts, K choices, `E` where there is none); it is divided by the step's valid tokens."""

    name: str  # of its value, and of what is reported
    weight: float
    functions: str  # "package.module:function" or "folder/file.py:function"
    scores_kept: int = 2  # times [T, E] numbers that it keeps for backward

    def __post_init__(self) -> None:
        if not self.name.endswith("_loss") or self.name in OUR_LOSSES:
            raise ValueError(f"an auxiliary loss is named {self.name!r}: choose a name of its own that ends in _loss")


class MoE(Block):
    name = "moe"
    functions = "megalina.model.moe:MoE"
    heavy = ("experts", "shared")

    # facts
    @property
    def kind(self) -> type[RouterKind]:
        return kind_of(self.router)

    @property
    def deferrable(self) -> Sequence[str]:
        return ("route", "score", "shared", "experts") if self.kind.defers else ("shared", "experts")

    @property
    def inputs(self) -> int:
        """Numbers that the activation reads for each that it gives."""
        return activation_of(self.model).inputs

    @property
    def is_global(self) -> bool:
        """The balance loss needs the choices of all ranks: layers give the sums it is made of."""
        return self.router.group == "global"

    @property
    def router_losses(self) -> Sequence[RouterLoss]:
        found = [load(reference) for reference in self.router.losses]
        for reference, loss in zip(self.router.losses, found, strict=True):
            if not isinstance(loss, RouterLoss):
                raise ValueError(f"router.losses: {reference} is no megalina.blocks.moe.RouterLoss")
        if len({loss.name for loss in found}) != len(found):
            raise ValueError(f"router.losses are named {', '.join(loss.name for loss in found)}: each needs a name of its own")
        return found

    @property
    def losses(self) -> Sequence[Loss]:
        router = self.router
        balance = ("global_aux",) if self.is_global else ("aux",)
        weight = router.mutual_information_loss
        own = [Loss(loss.name, (loss.name,), loss.weight, "valid_tokens") for loss in self.router_losses]
        return [
            Loss("balance_loss", balance, router.balance_loss, "valid_tokens"),
            Loss("z_loss", ("z",), router.z_loss, "valid_tokens"),
            *([Loss("locality_loss", ("locality",), router.locality_loss, "valid_tokens")] if router.locality_loss else []),
            *([Loss("mutual_information_loss", ("information",), weight, "valid_tokens")] if weight else []),
            *own,
        ]

    def parameters(self) -> Sequence[Parameter]:
        model, experts, ep = self.model, self.model.num_experts, {"ep": 0}
        out = norm_parameters("mlp_norm", model)
        if self.kind.has_gate:
            std = None if self.kind.gate_std is None else self.kind.gate_std or model.init_std
            out.append(Parameter("router.weight", self.kind.gate_shape(experts, model.d_model), std, matrix="router"))
        if self.router.bias:
            out.append(Parameter("router.bias", (experts,), 0.0))
        hidden = self.inputs * model.d_ff
        out.append(Parameter("experts.w1", (experts, hidden, model.d_model), model.init_std, ep, stacked=self.inputs))
        out.append(Parameter("experts.w2", (experts, model.d_model, model.d_ff), output_std(model), ep))
        if model.bias:
            out.append(Parameter("experts.b1", (experts, hidden), 0.0, ep, decay=False))
            out.append(Parameter("experts.b2", (experts, model.d_model), 0.0, ep, decay=False))
        if model.shared_d_ff:
            out += mlp_parameters("shared", model, model.shared_d_ff, cut=False)
        if model.shared_gate:
            out.append(Parameter("shared.gate", (1, model.d_model), model.init_std, matrix="router"))
        return out

    # lines
    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        """With tp each rank routes its own 1/tp of the tokens, with cp those of its part of each sequence."""
        copied = shape.copied(layer)
        slices = shape.tp and not shape.sequence  # activations are copied over tp: cut here, gather at the end
        h = "own" if slices else reads
        shared = bool(self.model.shared_d_ff)
        out = [compute("slice", layer, reads, "own")] if slices else []
        out += self._routing(shape, layer, h, "rows weight", "#order #load")
        # Experts that choose take as many tokens in each layer; of the share of the tokens that a rank has with tp or cp, not as
        # many.
        counted = shape.moe_layers[0] if self.counted_once and not shape.sharers else layer
        counts = exchange("counts", layer, Op.COUNTS, "counts", self.wire_order, "#sizes") if counted == layer else []
        (sizes,) = names("#sizes", counted)
        dispatch = exchange("dispatch", layer, Op.TOKENS, "ep", self.sent_value, "got", (sizes,))
        out += [
            *self.packing(layer),
            *counts,
            dispatch[0],
            *([compute("shared", layer, "moe_n", "s", copied)] if shared else []),  # under the dispatch
            dispatch[1],
            compute("experts", layer, f"got {sizes}", "y", f"experts.{layer}"),
            *exchange("combine", layer, Op.TOKENS, "ep", "y", "back", (sizes,)),
            compute("mix", layer, f"{h} {self.mixed(shared)} #batch", "mixed" if slices else writes),
        ]
        if slices:
            out += exchange("mix_gather", layer, Op.GATHER, "tp", "mixed", writes)
        return out

    sent_value, wire_order = "rows", "#order"  # what travels, and in which order

    @property
    def counted_once(self) -> bool:
        """Ranks get as many rows in each layer."""
        return self.kind.experts_choose

    def packing(self, layer: int) -> list[Instruction]:
        """What makes `sent_value` of what the router gives."""
        return []

    def mixed(self, shared: bool) -> str:
        """What `mix` reads beside the stream."""
        return f"back weight {'s ' if shared else ''}#order"

    def _routing(self, shape: Shape, layer: int, h: str, first: str, last: str) -> list[Instruction]:
        """What a router decides is `first`, the losses' values, `last`."""
        copied = shape.copied(layer)
        losses = " ".join(v for loss in self.losses for v in loss.values).replace("global_aux", "prob")
        routed = f"{first} {losses} {last}"
        if shape.sharers:  # decisions about a group of tokens need the scores of all of them
            return [
                compute("score", layer, h, "moe_n score #score", copied),
                *exchange("scores", layer, Op.GATHER, shape.sharers, "#score", "#scores"),
                compute("select", layer, "moe_n score #scores #batch", routed),
            ]
        written = "moe_n " if self.model.shared_d_ff else ""
        return [compute("route", layer, f"{h} #batch", written + routed, copied)]

    # work
    def work(self, at: At) -> Piece:
        rank, own = at.rank, at.own
        rows = own * at.top_k
        match at.name:
            case "route":
                return self._score_work(at) + self._select_work(at)
            case "slice":
                return moved(rank, 2 * own, own + at.tokens, 1, 2)
            case "score":
                return self._score_work(at)
            case "select":
                return self._select_work(at)
            case "shared":
                gate = linear(rank, own, 1, rank.width) + moved(rank, 2 * own, 4 * own, 2, 4)
                return work.mlp(rank, own, self.model.shared_d_ff) + (gate if self.model.shared_gate else Piece())
            case "cut" | "join":
                return moved(rank, 2 * rows, 2 * rows, 2, 2)
            case "experts":
                return self._experts_work(at, at.load * rows / at.instruction.chunk[1])
            case "mix":
                return self._mix_work(at, rows)
        return super().work(at)

    def _local(self, at: At) -> float:
        """Experts here."""
        return self.model.num_experts / at.rank.ep

    def _regroups(self, at: At) -> bool:
        """Rows arrive sorted by rank, and must be sorted by expert."""
        return at.rank.ep > 1 and self._local(at) > 1

    def _experts_work(self, at: At, rows: float) -> Piece:
        """All experts here in one kernel where the grouped product runs; else kernels of their own for each."""
        model, rank, local = self.model, at.rank, self._local(at)
        cpu = rank.config.cluster.hardware.host_is_device
        grouped = rank.config.train.dtype == "bfloat16" and not cpu and model.d_model % 8 == 0 and model.d_ff % 8 == 0
        one = work.mlp(rank, rows / local, model.d_ff, count=local if grouped else 1)
        out = one if grouped else one.repeated(round(local))
        return out + (moved(rank, 4 * rows, 4 * rows, 2, 2) if self._regroups(at) else Piece())

    def _score_work(self, at: At) -> Piece:
        """The norm, and the router's logits, which are at least float32."""
        rank, own = at.rank, at.own
        if not self.kind.has_scores:
            return norm(rank, own)
        cast_bytes = own * rank.width * (rank.element + rank.main) * rank.mixed
        cast = Work((), cast_bytes, int(cast_bytes > 0))
        gate = linear(rank, own, self.model.num_experts, rank.width, wide=rank.mixed)
        if not self.kind.has_gate:
            gate = Piece(gate.forward, gate.backward)  # nothing of it is learned
        return norm(rank, own) + (gate + Piece(cast, cast))

    def _select_work(self, at: At) -> Piece:
        """Choices of experts, losses, the rows' order, and the rows."""
        rows, logit_bytes = at.own * at.top_k, self.model.num_experts * at.rank.main
        forward, backward = (at.own * passes * logit_bytes for passes in SELECT_PASSES)
        forward += 2 * at.all_tokens * logit_bytes + rows * 8 * 10  # the best of all tokens' logits; sorted int64
        order = Piece(Work((), forward, SELECT_KERNELS), Work((), backward, SELECT_KERNELS / 2))
        return order + moved(at.rank, 2 * rows, rows + at.own, 1, 1)

    def _mix_work(self, at: At, rows: float) -> Piece:
        """Each token's rows by weight, on top of the residual; router's weights are at least float32."""
        rank, own = at.rank, at.own
        if not rank.mixed:
            out = moved(rank, rows + 4 * own, 8 * rows, 2, 6)
        else:
            wider = rank.main / rank.element
            out = moved(rank, rows * (3 + 4 * wider) + own * (1 + 3 * wider), rows * (8 + 6 * wider), 3 * rows / own, 9)
        return out + (residual(rank, own) if self.model.shared_d_ff else Piece()) + moved(rank, 0, 3 * own, 0, 1)

    # memory
    def memory(self, at: At) -> Inside:
        rank, own, sent = at.rank, int(at.own), self.sent(at)
        rows, index = sent * rank.width * rank.element, INT_BYTES * sent
        match at.name:
            case "slice":
                number = rank.width * rank.element
                return Inside(0, own * number, int(at.held) * number)
            case "route":
                return self._route_memory(at, sent, score=True, select=True)
            case "score":
                return self._route_memory(at, 0, score=True, select=False)
            case "select":
                return self._route_memory(at, sent, score=False, select=True)
            case "shared":
                return self._shared_memory(rank, own)
            case "cut":
                return Inside(index, rows + DIGESTED * index, 2 * rows)
            case "join":
                return Inside(index, 2 * rows, rows)
            case "experts":
                return self._experts_memory(at)
            case "mix":
                return self._mix_memory(at, sent)
        return super().memory(at)

    def sent(self, at: At) -> int:
        """Rows that a rank sends."""
        return self._of_chunk(at, int(at.own) * self._of_token)

    def got(self, at: At) -> int:
        """Rows that a rank gets."""
        over = min(at.rank.skew_L[at.layer], self._limit) if at.rank.ep > 1 else 1.0
        return self._of_chunk(at, int(at.own) * self._of_token * over)

    @property
    def _of_token(self) -> float:
        """Rows of a token, on average."""
        factor = self.router.capacity_factor
        return self.router.top_k * ((factor or 1.0) if self.kind.experts_choose else min(1.0, factor or 1.0))

    @property
    def _limit(self) -> float:
        """The most rows of an expert over the mean."""
        factor = self.router.capacity_factor
        return 1.0 if self.kind.experts_choose else max(factor, 1.0) if factor else float("inf")

    def _of_chunk(self, at: At, rows: float) -> int:
        return round(rows / (at.instruction.chunk[1] if "c" in at.instruction.part else 1))

    def _experts_here(self, at: At) -> int:
        return self.model.num_experts // int(at.rank.ep)

    def _most(self, at: At, got: int) -> int:
        """Rows that go through one expert's matrices at once."""
        here = self._experts_here(at)
        if here == 1 or (at.rank.cuda and at.rank.mixed):  # grouped products take all
            return got
        return min(got, round(got / here * min(at.rank.expert_skew_L[at.layer], self._limit)))

    def _experts_memory(self, at: At) -> Inside:
        rank, got, hidden, read = at.rank, self.got(at), self.model.d_ff, self.inputs * self.model.d_ff
        x, h = got * rank.width * rank.element, got * read * rank.element
        most, reorders, late = self._most(at, got), self._regroups(at), at.instruction.late
        clamps = activation_of(self.model).clamps
        kept = h + x * reorders
        forward = kept + x + max(most * hidden * rank.element * (1 + clamps), x * reorders)
        first = h if late else most * read * rank.element  # gradients of what the first matrix gave
        products = 0 if late else memory.mlp_products(rank, most, read)
        backward = x * (1 + reorders) + first + most * hidden * (2 * rank.element + clamps) + products
        return Inside(kept, forward, backward)

    def _shared_memory(self, rank: Rank, own: int) -> Inside:
        """Gated, what the MLP gives is kept beside its product with the gate."""
        inside = memory.mlp(rank, own, self.model.shared_d_ff, whole=False, bias=self.model.bias)
        if not self.model.shared_gate:
            return inside
        x, number = own * rank.width * rank.element, own * rank.element
        forward = max(inside.forward, inside.kept + 2 * x + 2 * number)
        return Inside(inside.kept + x + number, forward, max(inside.backward + x, 3 * x))

    def deferred(self, at: At) -> Deferred:
        rank, got, own = at.rank, self.got(at), int(at.own)
        match at.name:
            case "experts":  # what the first matrix gave, and its gradient; rows in the order of experts
                x, h = got * rank.width * rank.element, got * self.inputs * self.model.d_ff * rank.element
                rise = self._most(at, got) * self.model.d_ff * rank.element
                rise += memory.outer(rank, rank.width, self.inputs * self.model.d_ff)
                regroups = self._regroups(at)
                return Deferred(2 * h + x * regroups, reads=not regroups, gradients=True, rise=rise)
            case "shared":
                return memory.deferred_mlp(rank, own, self.model.shared_d_ff, whole=False)
        width = rank.width + self.model.num_experts  # the normed tokens, and the gradients of the logits
        return Deferred(own * width * rank.main, rise=self.model.num_experts * rank.width * rank.main)

    def _route_memory(self, at: At, sent: int, *, score: bool, select: bool) -> Inside:
        """The router's numbers are of at least 32 bits."""
        rank, o = at.rank, int(at.own)
        x, wide, scores = (o * n for n in (rank.width * rank.element, rank.width * rank.main, self.model.num_experts * rank.main))
        gate = self.kind.has_gate
        before = memory.norm(rank, o) if score else Inside()
        written = self._is_value(rank)
        copied = score and gate and (rank.mixed or not written)
        kept = before.kept + wide * (copied + self.kind.rows_kept * score)
        if select:
            # how far from home each expert is, token by token; logarithms, their probabilities, and those less the mean's
            local, information = 1 * (self.router.locality_loss > 0), 3 * (self.router.mutual_information_loss > 0)
            kept += (self.kind.scores_kept + local + information + sum(loss.scores_kept for loss in self.router_losses)) * scores
            dropped = o * at.top_k if self.router.has_capacity and not self.kind.experts_choose else 0
            kept += dropped * (INT_BYTES + 1)  # choices before drops, and which of them were
        rows, order = sent * rank.width * rank.element, INT_BYTES * sent
        normed = x if score and (rank.mixed or written or not gate) else 0
        results = rows + ORDER * order + normed
        forward = max(before.forward + before.kept, kept + results + DIGESTED * order * select + 2 * scores)
        summed = x * select  # rows back to tokens
        through = (wide + x * rank.mixed) if score and self.kind.has_scores else 0  # the router's part of it
        tail = x + before.backward - wide * copied if score else 0
        return Inside(kept, forward, max(summed + through + 4 * scores, tail))

    def _is_value(self, rank: Rank) -> bool:
        """The normed tokens are a value themselves."""
        return self.model.shared_d_ff > 0 or rank.shares_tokens

    def _mix_memory(self, at: At, sent: int) -> Inside:
        rank, o = at.rank, int(at.own)
        x, rows = o * rank.width * rank.element, sent * rank.width
        kept, working = memory.dropout(rank, o)
        shared = self.model.shared_d_ff > 0
        summed = x + 2 * o * rank.width * rank.main * rank.mixed
        forward = summed + (x if shared or kept else 0) + kept + working
        # gradients of rows, and their products with the rows
        split = rows * (rank.element + 3 * rank.main if rank.mixed else 2 * rank.element)
        added = x if shared or kept else 0  # the residual's gradient is there first
        return Inside(kept, forward, max(split + added, rows * rank.element + x * (1 + shared)) + (x if kept else 0))

    def keeps(self, at: At) -> Sequence[str]:
        """The router reads the normed tokens as they are."""
        same = at.name in ("route", "score") and not at.rank.mixed and self.kind.has_gate
        return [v for v in at.instruction.writes if same and v.startswith("moe_n.")]

    def value_bytes(self, at: At) -> Mapping[str, int]:
        rank, own, tokens = at.rank, int(at.own), int(at.all_tokens)
        number, scores = rank.width * rank.element, self.model.num_experts * rank.main
        sent, got = self.sent(at), self.got(at)
        return {
            **dict.fromkeys(("own", "mixed", "moe_n", "s"), own * number),
            **dict.fromkeys(("rows", "back"), sent * number),
            **dict.fromkeys(("got", "y"), got * number),
            **{"weight": own * at.top_k * rank.main, "score": own * scores, "#score": own * scores, "#scores": tokens * scores},
            "#order": ORDER * INT_BYTES * sent,
            "#sizes": 2 * INT_BYTES * got if self._regroups(at) else 0,
        }
