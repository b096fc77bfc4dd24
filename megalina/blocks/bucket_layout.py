"""The layout of a bucket: where its parameters lie, which matrices are updated as wholes, and with ZeRO-1 whose they are.

Matrices come first, then what else has weight decay, then the rest.  Without whole matrices every rank gets an even part of each
piece.  With them a rank's shard is a run of whole matrices and parameters, cut so that the rank with the most work has as little
as can be; what is sent is then as uneven as the shards are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megalina.blocks.parameter import Parameter
from megalina.step.program import Matrices

ALIGNMENT = 16  # elements; grouped matrix products want rows at multiples of 16 bytes
ELEMENT_WORK = 100.0  # FLOPs that take as long as to read and write an element and its state, roughly; only shares depend on it


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter as a rank holds it."""

    parameter: Parameter
    shape: tuple[int, ...]  # here
    whole: bool = False  # the optimizer takes it as whole matrices

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    def matrices(self, start: int, *, gathered: bool) -> Matrices:
        """`gathered`: those that tp cuts are updated as wholes, too."""
        *outer, rows, columns = self.shape
        stacked, cut = self.parameter.stacked, self.parameter.sharded.get("tp", -1) - len(outer)
        assert stacked == 1 or cut != 0, f"{self.parameter.name}: tp would cut matrices that lie one under the other"
        count = self.numel // (rows // stacked * columns)
        return Matrices(start, count, rows // stacked, columns, cut if gathered and cut >= 0 else -1)


@dataclass(frozen=True, slots=True)
class BucketLayout:
    order: tuple[int, ...]  # of the members, as they were given
    starts: tuple[int, ...]  # of the members in this order
    matrix_stop: int  # behind it nothing is updated as a whole matrix
    decay_stop: int  # behind it nothing has weight decay
    numel: int  # with padding
    matrices: tuple[Matrices, ...]
    shares: tuple[tuple[int, int], ...]  # of each rank; (): even parts of each piece


def lay_out_bucket(
    name: str, members: Sequence[Member], *, ranks: int, tp: int, matrix_work: Callable[[int, int], float]
) -> BucketLayout:
    """`name`: of the bucket, with its layer; `ranks`: that share the update, 1 without ZeRO-1; `tp`: ranks that gather the
    matrices which they cut, 1: nobody does; `matrix_work(rows, columns)`: FLOPs of a whole matrix's update."""
    turn = int(name.partition(".")[2] or 0)
    has_matrices = any(member.whole for member in members)

    def rank_of(i: int) -> tuple[bool, bool, str]:
        parameter = members[i].parameter
        return not members[i].whole, not parameter.decay, parameter.name if has_matrices else ""

    order = sorted(range(len(members)), key=rank_of)
    starts, matrices = list[int](), list[Matrices]()
    ends, work = list[int](), list[float]()  # of what no shard may cut
    stop = matrix_stop = decay_stop = 0
    for i in order:
        member, start = members[i], stop
        starts.append(start)
        stop = -(-(start + member.numel) // ALIGNMENT) * ALIGNMENT
        if member.whole:
            of = member.matrices(start, gathered=tp > 1)
            sides = [of.rows * (tp if of.cut == 0 else 1), of.columns * (tp if of.cut == 1 else 1)]
            matrices.append(of)
            ends += [start + (k + 1) * of.numel for k in range(of.count - 1)]
            work += [matrix_work(*sides) + ELEMENT_WORK * of.numel] * of.count
            matrix_stop = stop
        else:
            work.append(ELEMENT_WORK * member.numel)
        ends.append(stop)
        if member.parameter.decay:
            decay_stop = stop
    shares: tuple[tuple[int, int], ...] = ()
    if ranks > 1 and matrices:
        shares = in_turns(shared_out(tuple(ends), tuple(work), ranks), ranks, turn)
    grain = ALIGNMENT * (ranks if not shares else 1)  # every piece must fall into equal parts
    numel = stop if shares else -(-stop // grain) * grain
    return BucketLayout(tuple(order), tuple(starts), matrix_stop, decay_stop, numel, tuple(matrices), shares)


@lru_cache(maxsize=64)  # layers are alike
def shared_out(ends: tuple[int, ...], work: tuple[float, ...], ranks: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of at most so many runs of units, of which the heaviest is as light as can be.  `ends`: of the units."""
    low, high = max(work), sum(work)
    for _ in range(50):  # the least limit at which filling one rank after another needs no more of them
        middle = (low + high) / 2
        low, high = (low, middle) if len(_filled(work, middle)) <= ranks else (middle, high)
    stops = [ends[count - 1] for count in _filled(work, high)]
    return tuple(zip([0, *stops[:-1]], stops, strict=True))


def in_turns(runs: Sequence[tuple[int, int]], ranks: int, turn: int) -> tuple[tuple[int, int], ...]:
    """Each rank's run, in order.  Where there are fewer than ranks, others have none each turn: over layers all get as many."""
    idle = ranks - len(runs)
    without = {(turn * idle + i) % ranks for i in range(idle)}
    out, left, stop = list[tuple[int, int]](), list(runs), 0
    for rank in range(ranks):
        start, stop = (stop, stop) if rank in without else left.pop(0)
        out.append((start, stop))
    return tuple(out)


def _filled(work: Sequence[float], limit: float) -> list[int]:
    """Units of the first rank, of the first two, ...: none has more than `limit`, which is no less than any unit."""
    counts, here = list[int](), 0.0
    for i, amount in enumerate(work):
        if here + amount > limit and i:
            counts.append(i)
            here = 0.0
        here += amount
    return [*counts, len(work)]
