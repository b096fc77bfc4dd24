"""Parts: what cuts the values of a micro-batch where a range of the forward pass walks in parts, and joins them again.

It has no lines of its own: `megalina/step/partition.py` puts them where a strategy wants them."""

from collections.abc import Mapping

from megalina.blocks.block import Block
from megalina.blocks.dense_moe import DenseMoE
from megalina.blocks.memory import Inside
from megalina.blocks.moe import DIGESTED, ORDER, MoE
from megalina.blocks.routers import kind_of
from megalina.blocks.sizes import INT_BYTES, At
from megalina.blocks.work import Piece, moved, small
from megalina.step.forward import Shape
from megalina.step.program import Instruction

KERNELS = 12  # of cut_rows, about tensors of indices


class Parts(Block):
    name = "parts"
    functions = "megalina.model.parts:Parts"
    cheap = ("cut_batch", "cut_tokens", "cut_rows", "join_tokens")

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        return []

    def work(self, at: At) -> Piece:
        match at.name:
            case "cut_tokens":  # views; their gradients are put side by side
                number = sum(map(self._is_wide, self._wholes(at)))
                return moved(at.rank, 0, 2 * number * at.held, 0, number)
            case "join_tokens":
                number = len(self._wholes(at))
                return moved(at.rank, 2 * number * at.held, 0, number, 0)
            case "cut_rows":
                rows = at.own * at.top_k
                return moved(at.rank, 2 * rows, 2 * rows, 1, 1) + Piece(small(KERNELS))
        return Piece(small(1))

    def memory(self, at: At) -> Inside:
        rank, sent = at.rank, self._moe.sent(at)
        rows, index = sent * rank.width * rank.element, INT_BYTES * sent
        whole = sum(self._bytes(v, at) for v in self._wholes(at))
        mixed_up = rank.tp > 1 and not rank.config.parallel.sequence  # a part's tokens are not side by side
        match at.name:
            case "cut_tokens":
                return Inside(0, whole * mixed_up, whole)
            case "join_tokens":
                return Inside(0, whole, whole * mixed_up)
            case "cut_rows":
                return Inside(index, rows + (DIGESTED + ORDER) * index, 2 * rows)
        return Inside()

    def value_bytes(self, at: At) -> Mapping[str, int]:
        return self._moe.value_bytes(at)

    @property
    def _moe(self) -> MoE:
        return DenseMoE(self.whole) if kind_of(self.router).is_dense else MoE(self.whole)

    def _wholes(self, at: At) -> tuple[str, ...]:
        """The values that are cut, or made of parts."""
        instruction = at.instruction
        return instruction.reads if at.name.startswith("cut") == (instruction.phase == "F") else instruction.writes

    def _bytes(self, value: str, at: At) -> int:
        stream = int(at.held) * at.rank.width * at.rank.element
        return self.value_bytes(at).get(_head(value), stream)

    def _is_wide(self, value: str) -> bool:
        """Whether it has the model's width."""
        return _head(value) != "weight"


def _head(value: str) -> str:
    return value.partition(".")[0].rstrip("'")
