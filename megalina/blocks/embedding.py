"""The embedding: words and learned positions, and the output matrix where it is another one than the words'."""

from collections.abc import Mapping, Sequence

from megalina.blocks import memory
from megalina.blocks.block import Block
from megalina.blocks.memory import Inside
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import INT_BYTES, At
from megalina.blocks.work import Piece, moved
from megalina.step.forward import Shape, compute, exchange
from megalina.step.program import Instruction, Op


class Embedding(Block):
    name = "embedding"
    functions = "megalina.model.embedding:Embedding"

    @property
    def learned(self) -> bool:
        return self.model.positions == "learned"

    def parameters(self) -> Sequence[Parameter]:
        model, whole = self.model, self.whole
        shape = (whole.padded_vocab, model.d_model)
        out = [Parameter("embedding", shape, model.init_std, {"tp": 0}, rows=whole.vocab_size, matrix="words")]
        if not model.tie_embeddings:
            out.append(Parameter("head", shape, model.init_std, {"tp": 0}, rows=whole.vocab_size, matrix="words"))
        if self.learned:
            out.append(Parameter("positions", (whole.max_positions, model.d_model), model.init_std, decay=False, matrix="words"))
        return out

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        placed = [shape.positions] if self.learned or not shape.pipeline else []
        if not shape.tp:
            return [compute("embed", layer, "#batch", writes, "embedding", *placed)]
        op = Op.SCATTER if shape.sequence else Op.SUM
        return [
            compute("embed", layer, "#batch", "e", "embedding"),
            *exchange("embed_sum", layer, op, "tp", "e", "embedded"),
            compute("positions", layer, "embedded #batch", writes, *placed),
        ]

    def work(self, at: At) -> Piece:
        rank = at.rank
        if at.name == "positions":
            return self._positions_work(at, at.held)
        looked_up = moved(rank, 2 * at.tokens, 2 * at.tokens * (1 + rank.main / rank.element), 1, 2)
        return looked_up + (self._positions_work(at, at.tokens) if rank.tp == 1 else Piece())

    def _positions_work(self, at: At, tokens: float) -> Piece:
        if not self.learned:
            return Piece()
        return moved(at.rank, 5 * tokens, 2 * tokens * (1 + at.rank.main / at.rank.element), 2, 2)

    def memory(self, at: At) -> Inside:
        rank, tokens = at.rank, int(at.tokens)
        if at.name == "positions":
            return self._positions_memory(at, int(at.held))
        looked_up = tokens * rank.width * rank.element
        placed = self._positions_memory(at, tokens) if rank.tp == 1 else Inside()
        forward = max(looked_up * (1 if rank.tp == 1 else 2), looked_up + placed.forward if placed.forward else 0)
        gradient = memory.weight_gradient(rank, int(rank.words) * rank.width, rank.element)
        ids = INT_BYTES * tokens
        return Inside(ids + placed.kept, forward + ids, max(gradient, placed.backward))

    def _positions_memory(self, at: At, held: int) -> Inside:
        rank = at.rank
        x = held * rank.width * rank.element
        kept, working = memory.dropout(rank, held)
        gradient = memory.weight_gradient(rank, self.whole.max_positions * rank.width, rank.element)
        return Inside(
            kept + INT_BYTES * held * self.learned,
            2 * x * self.learned + kept + working,
            gradient * self.learned + x * (rank.tp > 1),
        )

    def value_bytes(self, at: At) -> Mapping[str, int]:
        number = at.rank.width * at.rank.element
        return {"e": int(at.tokens) * number, "embedded": int(at.held) * number}
