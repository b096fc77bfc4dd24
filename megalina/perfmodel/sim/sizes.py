"""Sizes: what each START of a list sends, and as which collective."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from megalina.perfmodel.sim.collectives import Collective, Floats
from megalina.step.program import MOVABLE, Instruction, Op


@dataclass(frozen=True, slots=True)
class Sizes:
    """`bytes_of` a START: the whole tensor that a rank sends (all-to-all: also to itself), sums, or has after a gather.

    `matrix_of` an all-to-all and the ranks of its group: bytes from each to each, in place of even parts; None: even."""

    bytes_of: Callable[[Instruction], float]
    scattered: Collection[str] = ()  # buckets whose gradients are reduce-scattered, not all-reduced
    matrix_of: Callable[[Instruction, tuple[int, ...]], Floats | None] | None = None
    by_node: bool = False  # gradients are summed, and ZeRO-1's weights gathered, by node
    tokens_by_node: bool = False  # tokens are sent once to each node; bytes are those between nodes

    def collective(self, instruction: Instruction) -> Collective:
        what = self._flat(instruction)
        by_node = self.tokens_by_node if instruction.op is Op.TOKENS else self.by_node and instruction.op in MOVABLE
        return what.by_node if by_node else what

    def _flat(self, instruction: Instruction) -> Collective:
        if instruction.op in (Op.TOKENS, Op.COUNTS, Op.EVEN):
            return Collective.ALL_TO_ALL
        if instruction.op in (Op.SEND, Op.RECV):
            return Collective.SEND
        if instruction.op in (Op.GATHER, Op.PARAMS):
            return Collective.ALL_GATHER
        if instruction.op is Op.SCATTER or (instruction.op is Op.GRADS and instruction.buckets[0] in self.scattered):
            return Collective.REDUCE_SCATTER
        return Collective.ALL_REDUCE

    def sent(self, instruction: Instruction, ranks: tuple[int, ...]) -> tuple[Collective, float, Floats | None]:
        """Which collective, and for how many bytes; or for how many from each to each, and then the tensor counts as one byte."""
        what = self.collective(instruction)
        bytes_NN = self.matrix_of(instruction, ranks) if self.matrix_of and what.flat is Collective.ALL_TO_ALL else None
        return what, self.bytes_of(instruction) if bytes_NN is None else 1.0, bytes_NN


def own_bytes(what: Collective, num_bytes: float, ranks: int, place: int = 0, bytes_NN: Floats | None = None) -> float:
    """What `megalina.comm.exchange.Pending` counts of one rank's part: bytes to others (of an all-to-all from others, if they are
    more), of a sum or a scatter its tensor.  `num_bytes`, `bytes_NN`: as in `Sizes`; `ranks`: by node of an all-to-all nodes."""
    if what.flat is Collective.ALL_GATHER:
        return num_bytes / ranks
    if what.flat is not Collective.ALL_TO_ALL:
        return num_bytes
    if bytes_NN is None:
        return num_bytes * (ranks - 1) / ranks
    return float(max(bytes_NN[place].sum(), bytes_NN[:, place].sum()) - bytes_NN[place, place])
