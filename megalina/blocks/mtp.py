"""Multi-token prediction (DeepSeek-V3 technical report, arXiv:2412.19437, section 2.2): layers behind the last one, of which the
k-th predicts the word after next k times over, in training alone.

A layer reads what the one before it gives, behind that one's last norm, and the embedding of the word k places further on; two
norms and a matrix make a stream of both, through which blocks go as through any layer.  Its own last norm, the shared output
matrix and the labels k places further on make its loss.  Words are shifted where they are looked up, inside their row: each
tensor-parallel rank has all words of its micro-batch, so nothing of the stream is shifted.
"""

from collections.abc import Mapping, Sequence

from megalina.blocks import memory
from megalina.blocks.block import Block, Loss, norm_parameters
from megalina.blocks.head import Head
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import INT_BYTES, At
from megalina.blocks.work import Piece, linear, moved, norm
from megalina.step.forward import Shape, compute, exchange
from megalina.step.program import Instruction, Op


class Mtp(Block):
    """What leads into such a layer.  Its parameters are also those of the layer's end."""

    name = "mtp"
    functions = "megalina.model.mtp:Mtp"

    @property
    def emulated(self) -> Sequence[str]:
        return ("mtp", "mtp_merge")

    @property
    def deferrable(self) -> Sequence[str]:
        return self.emulated

    def parameters(self) -> Sequence[Parameter]:
        model = self.model
        return [
            *norm_parameters("mtp.embedding_norm", model),
            *norm_parameters("mtp.hidden_norm", model),
            Parameter(
                "mtp.projection", (model.d_model, 2 * model.d_model), model.init_std
            ),  # of the embedding, then of the stream
            *norm_parameters("mtp.norm", model),
        ]

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        before = shape.ends if layer == shape.num_layers else shape.copied(layer - 1)  # whose last norm is taken
        if not shape.tp:
            return [compute("mtp", layer, f"{reads} #batch", writes, "embedding", before, shape.copied(layer))]
        op = Op.SCATTER if shape.sequence else Op.SUM
        return [
            compute("mtp_embed", layer, "#batch", "mtp_e", "embedding"),
            *exchange("mtp_embed_sum", layer, op, "tp", "mtp_e", "mtp_embedded"),
            compute("mtp_merge", layer, f"{reads} mtp_embedded", writes, before, shape.copied(layer)),
        ]

    def work(self, at: At) -> Piece:
        match at.name:
            case "mtp_embed":
                return self._lookup_work(at)
            case "mtp_merge":
                return self._merge_work(at, at.held)
        return self._lookup_work(at) + self._merge_work(at, at.tokens)

    def _lookup_work(self, at: At) -> Piece:
        return moved(at.rank, 2 * at.tokens, 2 * at.tokens * (1 + at.rank.main / at.rank.element), 1, 2)

    def _merge_work(self, at: At, tokens: float) -> Piece:
        rank = at.rank
        one = norm(rank, tokens)
        return one + one + one + moved(rank, 4 * tokens, 4 * tokens, 1, 2) + linear(rank, tokens, rank.width, 2 * rank.width)

    def memory(self, at: At) -> Inside:
        rank, tokens = at.rank, int(at.tokens)
        looked_up, ids = tokens * rank.width * rank.element, INT_BYTES * tokens
        gradient = memory.weight_gradient(rank, int(rank.words) * rank.width, rank.element)
        match at.name:
            case "mtp_embed":
                return Inside(ids, 2 * looked_up + ids, gradient)
            case "mtp_merge":
                return self._merge_memory(at, int(at.held))
        merged = self._merge_memory(at, tokens)
        kept = merged.kept + looked_up + ids
        return Inside(kept, merged.forward + looked_up + ids, max(merged.backward, gradient + looked_up))

    def _merge_memory(self, at: At, rows: int) -> Inside:
        """Between its two norms the stream is kept, and both inputs of the matrix."""
        rank = at.rank
        x, inside = rows * rank.width * rank.element, memory.norm(rank, rows)
        kept = 3 * inside.kept + 3 * x
        return Inside(kept, kept + 2 * x, 3 * x + max(inside.backward, memory.outer(rank, rank.width, 2 * rank.width)))

    def deferred(self, at: At) -> Deferred:
        """Both inputs of the matrix, and the gradient of what it gave."""
        rank = at.rank
        rows = int(at.held if at.name == "mtp_merge" else at.tokens)
        x = rows * rank.width * rank.element
        return Deferred(2 * x, gradients=True, rise=memory.outer(rank, rank.width, 2 * rank.width))

    def value_bytes(self, at: At) -> Mapping[str, int]:
        number = at.rank.width * at.rank.element
        return {"mtp_e": int(at.tokens) * number, "mtp_embedded": int(at.held) * number}


class MtpHead(Head):
    """Its loss; all such layers' losses are weighted alike."""

    name = "mtp_head"
    functions = "megalina.model.mtp:MtpHead"
    prefix = "mtp_"

    @property
    def losses(self) -> Sequence[Loss]:
        return [Loss("mtp_loss", ("mtp_loss",), self.model.mtp_loss / self.model.mtp_layers, "loss_tokens")]

    def parameters(self) -> Sequence[Parameter]:
        return ()

    def norm_group(self, shape: Shape, layer: int) -> str:
        return shape.copied(layer)
