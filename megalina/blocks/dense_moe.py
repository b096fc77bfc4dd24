"""Experts that all compute every token, each output weighted by its probability: dense training (DS-MoE, Pan et al. 2024,
section 3, equations 1 to 3).

Its parameters are those of a mixture of experts, at the same names.  Where ep cuts the experts, each rank gathers the tokens of
all ranks of its row with their weights, computes its own experts' part of every token's sum, and the parts are summed on the way
back.  One product takes all experts here: to scale what the second matrix reads is to scale what it gives.
"""

from collections.abc import Mapping, Sequence

from megalina.blocks import memory, work
from megalina.blocks.activation import activation_of
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.moe import DIGESTED, MoE
from megalina.blocks.sizes import INT_BYTES, At, Rank
from megalina.blocks.work import Piece, Work, linear, moved, residual
from megalina.step.forward import Shape, compute, exchange
from megalina.step.program import Instruction, Op

SELECT_KERNELS = 16  # forward; counted in megalina/model/dense_moe.py
SELECT_PASSES = (8, 6)  # over the logits, forward and backward


class DenseMoE(MoE):
    functions = "megalina.model.dense_moe:DenseMoE"

    # lines
    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        """With tp each rank has its own 1/tp of the tokens."""
        copied = shape.copied(layer)
        slices = shape.tp and not shape.sequence  # activations are copied over tp: cut here, gather at the end
        h = "own" if slices else reads
        shared = bool(self.model.shared_d_ff)
        tokens = exchange("dispatch", layer, Op.GATHER, "ep", "rows", "got")
        weights = exchange("weights", layer, Op.GATHER, "ep", "weight", "weights")
        out = [compute("slice", layer, reads, "own")] if slices else []
        out += [
            *self._routing(shape, layer, h, "rows weight", "#load"),
            tokens[0],
            weights[0],
            *([compute("shared", layer, "moe_n", "s", copied)] if shared else []),  # under the gather
            tokens[1],
            weights[1],
            compute("experts", layer, "got weights", "y", f"experts.{layer}"),
            *exchange("combine", layer, Op.SCATTER, "ep", "y", "back"),
            compute("mix", layer, f"{h} back {'s ' if shared else ''}#batch", "mixed" if slices else writes),
        ]
        if slices:
            out += exchange("mix_gather", layer, Op.GATHER, "tp", "mixed", writes)
        return out

    # work
    def work(self, at: At) -> Piece:
        rank, own = at.rank, at.own
        match at.name:
            case "route":
                return self._score_work(at) + self._weigh_work(at)
            case "select":
                return self._weigh_work(at)
            case "cut" | "join":
                return moved(rank, 2 * own, 2 * own, 1, 1)
            case "experts":
                return self._all_experts_work(at, own * rank.ep / at.instruction.chunk[1])
            case "mix":
                return residual(rank, own) + (residual(rank, own) if self.model.shared_d_ff else Piece())
        return super().work(at)

    def _weigh_work(self, at: At) -> Piece:
        """Probabilities, losses, and a digest; what is sent are the normed tokens themselves."""
        numbers_bytes = at.own * self.model.num_experts * at.rank.main
        forward, backward = (passes * numbers_bytes for passes in SELECT_PASSES)
        return Piece(Work((), forward, SELECT_KERNELS), Work((), backward, SELECT_KERNELS / 2))

    def _all_experts_work(self, at: At, tokens: float) -> Piece:
        model, rank, local = self.model, at.rank, self._local(at)
        hidden = local * model.d_ff
        scaled_bytes, copied_bytes = tokens * hidden * rank.element, 2 * hidden * rank.width * rank.element
        scaling = Piece(Work((), 2 * scaled_bytes + copied_bytes, 2), Work((), 6 * scaled_bytes + copied_bytes, 4))
        biases = linear(rank, tokens, rank.width, local, wide=rank.mixed) if model.bias else Piece()
        return work.mlp(rank, tokens, hidden) + scaling + biases

    # memory
    def sent(self, at: At) -> int:
        """Tokens that a rank sends to each other one."""
        return self._of_chunk(at, int(at.own))

    def got(self, at: At) -> int:
        """Tokens that a rank's experts compute."""
        return self._of_chunk(at, int(at.own)) * int(at.rank.ep)

    def _is_value(self, rank: Rank) -> bool:
        return True

    def _route_memory(self, at: At, sent: int, *, score: bool, select: bool) -> Inside:
        base = super()._route_memory(at, 0, score=score, select=False)
        if not select:
            return base
        rank, o = at.rank, int(at.own)
        scores = o * self.model.num_experts * rank.main
        information = 3 * (self.router.mutual_information_loss > 0)  # logarithms, their probabilities, and those less the mean's
        kept = (self.kind.scores_kept + information + sum(loss.scores_kept for loss in self.router_losses)) * scores
        digested = DIGESTED * o * self.model.num_experts * INT_BYTES
        rows = o * rank.width * rank.element
        forward = base.kept + kept + rows + 2 * scores + digested
        return Inside(base.kept + kept, max(base.forward, forward), max(base.backward, 4 * scores + rows))

    def _experts_memory(self, at: At) -> Inside:
        """The second matrix is copied to be read by rows of all experts."""
        rank, tokens, here = at.rank, self.got(at), self._experts_here(at)
        x, a = tokens * rank.width * rank.element, tokens * here * self.model.d_ff * rank.element
        h, turned = a * self.inputs, here * self.model.d_ff * rank.width * rank.element
        wide = a * rank.main // rank.element * rank.mixed  # a product with weights that are at least float32
        products = 0 if at.instruction.late else memory.outer(rank, rank.width, here * self.inputs * self.model.d_ff)
        clamped = a * activation_of(self.model).clamps
        back = max(a + turned, 3 * a + h + 2 * wide + clamped // rank.element, 2 * a + h + x + products)
        return Inside(h, h + a + max(wide + a * rank.mixed, turned + x, clamped), back)

    def deferred(self, at: At) -> Deferred:
        if at.name != "experts":
            return super().deferred(at)
        rank, tokens, here = at.rank, self.got(at), self._experts_here(at)  # what the first matrix gave, and its gradient
        a = tokens * here * self.model.d_ff * rank.element
        rise = a * (1 + 2 * rank.mixed) + memory.outer(rank, rank.width, here * self.inputs * self.model.d_ff)
        return Deferred(2 * a * self.inputs, reads=True, gradients=True, rise=rise)

    def _mix_memory(self, at: At, sent: int) -> Inside:
        rank, o = at.rank, int(at.own)
        x = o * rank.width * rank.element
        kept, working = memory.dropout(rank, o)
        return Inside(kept, x * (1 + (self.model.shared_d_ff > 0)) + kept + working, x * (1 + bool(kept)))

    def keeps(self, at: At) -> Sequence[str]:
        """The router reads the normed tokens as they are, and the softmax keeps what it gives."""
        same = [v for v in at.instruction.writes if v.startswith("rows.") and at.name == "route" and not at.rank.mixed]
        same += [v for v in at.instruction.writes if v.startswith("weight.") and self.router.scale == 1.0]
        return [*super().keeps(at), *same]

    def value_bytes(self, at: At) -> Mapping[str, int]:
        weights = self.model.num_experts * at.rank.main
        return {**super().value_bytes(at), "weight": self.sent(at) * weights, "weights": self.got(at) * weights}
