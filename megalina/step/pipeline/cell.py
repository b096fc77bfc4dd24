"""Cells: what a pipeline rank does with one stage's layers and one micro-batch.  A step is one list of them a rank.

A model is cut into stages at borders between layers, stage 0 first; a rank of P holds V of them, its chunks.  As text a cell is
what torch.distributed.pipelining writes: `2F0` is forward of stage 2 for micro-batch 0, `2B0` its whole backward, `2I0` the
part of backward that gives the gradients of its inputs, `2W0` that of its weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Work(Enum):
    """What a cell does."""

    __hash__ = object.__hash__  # cells are hashed often, and Enum's own is slow

    FORWARD = "F"
    BACKWARD = "B"  # whole: gradients of inputs and of weights
    INPUT_GRADIENTS = "I"  # what the stage before waits for
    WEIGHT_GRADIENTS = "W"  # what nobody waits for before the update
    SEND_ACTIVATIONS = "SEND_F"  # this stage's output, to the next stage
    RECV_ACTIVATIONS = "RECV_F"  # this stage's input, from the stage before
    SEND_GRADIENTS = "SEND_B"  # of this stage's input, to the stage before
    RECV_GRADIENTS = "RECV_B"  # of this stage's output, from the next stage
    UNSHARD = "UNSHARD"  # these three are FSDP's, in torch's tables: weights gathered,
    RESHARD = "RESHARD"  # dropped again,
    REDUCE_GRAD = "REDUCE_GRAD"  # and their gradients summed over replicas


COMPUTED = (Work.FORWARD, Work.BACKWARD, Work.INPUT_GRADIENTS, Work.WEIGHT_GRADIENTS)
INPUTS_DONE = (Work.BACKWARD, Work.INPUT_GRADIENTS)  # with these the stage before can go on
WEIGHTS_DONE = (Work.BACKWARD, Work.WEIGHT_GRADIENTS)  # with these nothing of the micro-batch is needed any more
SENDS = {Work.SEND_ACTIVATIONS: Work.RECV_ACTIVATIONS, Work.SEND_GRADIENTS: Work.RECV_GRADIENTS}
RECEIVES = {recv: send for send, recv in SENDS.items()}
STEPS = {  # from the stage that a message is named by to its peer
    Work.SEND_ACTIVATIONS: 1,
    Work.RECV_ACTIVATIONS: -1,
    Work.SEND_GRADIENTS: -1,
    Work.RECV_GRADIENTS: 1,
}


@dataclass(frozen=True, slots=True)
class Cell:
    work: Work
    stage: int
    micro_batch: int | None = 0  # None: of FSDP's cells, which are of a stage alone

    def __str__(self) -> str:
        return f"{self.stage}{self.work.value}{'' if self.micro_batch is None else self.micro_batch}"

    @property
    def other_end(self) -> "Cell":
        """Of a message: the cell with which it meets, on the peer's list."""
        return Cell((SENDS | RECEIVES)[self.work], self.stage + STEPS[self.work], self.micro_batch)


Entry = tuple[Cell, ...]  # one cell; a forward and a backward whose instructions take turns; messages that go as one batch
CellList = tuple[Entry, ...]


def forward(stage: int, micro_batch: int) -> Entry:
    return (Cell(Work.FORWARD, stage, micro_batch),)


def backward(stage: int, micro_batch: int) -> Entry:
    return (Cell(Work.BACKWARD, stage, micro_batch),)


def input_gradients(stage: int, micro_batch: int) -> Entry:
    return (Cell(Work.INPUT_GRADIENTS, stage, micro_batch),)


def weight_gradients(stage: int, micro_batch: int) -> Entry:
    return (Cell(Work.WEIGHT_GRADIENTS, stage, micro_batch),)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One step: the list of each rank."""

    lists: tuple[CellList, ...]
    rank_of: tuple[int, ...]  # of each stage
    micro_batches: int

    @property
    def ranks(self) -> int:
        return len(self.lists)

    @property
    def stages(self) -> int:
        return len(self.rank_of)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, holder in enumerate(self.rank_of) if holder == rank)

    def peer(self, message: Cell) -> int:
        """The rank at the other end of a SEND or RECV."""
        return self.rank_of[message.other_end.stage]

    def cells(self, rank: int) -> Iterator[tuple[int, Cell]]:
        """Each cell of a rank with its position in the list."""
        for position, entry in enumerate(self.lists[rank]):
            for cell in entry:
                yield position, cell

    @property
    def has_pairs(self) -> bool:
        """Whether a forward and a backward go together anywhere."""
        return any(len(entry) > 1 and entry[0].work in COMPUTED for entries in self.lists for entry in entries)

    @property
    def has_messages(self) -> bool:
        return any(cell.work in STEPS for rank in range(self.ranks) for _, cell in self.cells(rank))


def entry_text(entry: Entry) -> str:
    """`2F0`; `(4F1;3B0)` of cells that go together."""
    return str(entry[0]) if len(entry) == 1 else f"({';'.join(map(str, entry))})"


def loop(ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank of each stage where every chunk goes through all ranks from the first to the last (Megatron's)."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def v_shape(ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank of each stage where the way turns at the last rank and at the first: with two chunks a V, and rank 0 has both
    the first stage and the last."""
    both_ways: Sequence[int] = (*range(ranks), *reversed(range(ranks)))
    return tuple(both_ways[stage % (2 * ranks)] for stage in range(ranks * chunks))
