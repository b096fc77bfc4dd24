"""Sizes of all-to-alls from routing that was recorded: the bytes that each rank sends each other one, in place of even parts."""

from collections.abc import Mapping
from dataclasses import replace

from megalina.perfmodel.sim.collectives import Floats, Ints
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import Instruction, Op

# (layer, part) -> [R, E]: rows that each rank of the world sends to each expert; where a token travels once, to each rank
Counts = Mapping[tuple[int, str], Ints]


def counted(sizes: Sizes, counts: Counts, *, row_bytes: tuple[int, int]) -> Sizes:
    """`sizes`, but tokens travel as `counts` say; a part's chunks get equal shares of each expert's rows.  `row_bytes`: of a
    row on its way to the experts, and back.

    What it makes raises ValueError for a layer or part that was not counted, and for experts that a group can't share evenly."""

    def matrix_of(instruction: Instruction, ranks: tuple[int, ...]) -> Floats | None:
        if instruction.op is not Op.TOKENS:
            return None  # split sizes are as long for each rank
        part = instruction.part.partition("c")[0]
        if (instruction.layer, part) not in counts:
            raise ValueError(
                f"{instruction.tag}: no rows were counted in layer {instruction.layer}, part {part}: record a step of this list"
            )
        rows_NN = rows_between(counts[instruction.layer, part][list(ranks)], instruction.chunk)
        there = instruction.name == "dispatch"
        return row_bytes[not there] * (rows_NN if instruction.outward else rows_NN.T)

    return replace(sizes, matrix_of=matrix_of)


def rows_between(count_NE: Ints, chunk: tuple[int, int] = (0, 1)) -> Floats:
    """[N, N]: rows that each rank of an ep group sends to each, from what it sends to each expert; of chunk c of n.

    Rank r of the group has the r-th N-th of the experts.  ValueError if N does not divide their number."""
    (ranks, experts), (c, n) = count_NE.shape, chunk
    if experts % ranks:
        raise ValueError(f"{experts} experts can't be shared evenly by {ranks} ranks")
    share_NE = count_NE * (c + 1) // n - count_NE * c // n
    return share_NE.reshape(ranks, ranks, experts // ranks).sum(2).astype(float)
