"""A pipeline in virtual time: a list for each pipeline rank, walked by one rank of its stage for all of them.

The ranks of a stage are alike, and so are the pipelines that go through all stages: one for each place in a stage.  So there are
as many walkers as pipeline ranks, and links that carry the same are one (`folding.py`), of each stage for itself.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from megalina.layout import EMBEDDING, rows, rows_across
from megalina.perfmodel.sim.collectives import Collective, Floats, Ints
from megalina.perfmodel.sim.folding import FoldedLoads, Use
from megalina.perfmodel.sim.network import Load, Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Timeline, simulate
from megalina.step.program import Instruction, Kind, Op, Program

WORLD = "world"
StageUse = tuple[str, Collective, tuple[int, ...]]  # along an axis, by the walkers that are on it; of a send the sender first


class Stages:
    """Where the ranks of a pipeline are: `number` stages of `shape` (as `megalina.layout.axis_sizes`), one behind the other."""

    def __init__(self, shape: Mapping[str, int], number: int, across: Mapping[str, Sequence[int]]):
        """`across`: axes between pipeline ranks, with these."""
        self.shape, self.number, self.across = shape, number, {axis: tuple(members) for axis, members in across.items()}
        self._rows = {axis: np.array(table) for axis, table in rows(shape).items()}
        self.size = len(self._rows[WORLD][0])

    @property
    def ranks(self) -> int:
        return self.size * self.number

    def walkers(self, axis: str, walker: int) -> tuple[int, ...]:
        """Those that are on an axis of one of them."""
        return tuple(range(self.number)) if axis == WORLD else self.across.get(axis, (walker,))

    def groups(self, axis: str, walkers: Sequence[int]) -> Ints:
        """The ranks of each of the groups that these walk for."""
        if axis == WORLD:
            return np.arange(self.ranks)[None]
        if axis in self.across:
            return np.array(rows_across(self.shape, walkers, "dp" if axis == EMBEDDING else ""))
        return self._rows[WORLD if axis == "stage" else axis] + walkers[0] * self.size

    def ranks_of(self, axis: str, walker: int) -> tuple[int, ...]:
        """The group of a walker, by numbers that it has alone: walkers come first, from 0 on."""
        table = self.groups(axis, self.walkers(axis, walker))
        own = next(row for row in table.tolist() if walker * self.size in row)
        return tuple(rank // self.size if rank % self.size == 0 else self.number + rank for rank in own)


class StageLoads(FoldedLoads):
    """What all that is alike puts on the links, for `uses_of`.  The groups of a stage end with the slowest of them."""

    def __init__(self, network: Network, stages: Stages, uses: Collection[StageUse]):
        self._number = stages.number
        groups = {_named(axis, walkers): stages.groups(axis, walkers) for axis, _, walkers in uses}
        named: list[Use] = [(_named(axis, walkers), what) for axis, what, walkers in uses]
        self._fold(network, stages.ranks, groups, named, slowest=True)

    def of(self, axis: str, what: Collective, ranks: tuple[int, ...], bytes_NN: Floats | None = None) -> tuple[Load, ...]:
        """`ranks`: as of `Stages.ranks_of`, of a send the sender first."""
        return self._by_use[_named(axis, tuple(rank for rank in ranks if rank < self._number)), what]


def _named(axis: str, walkers: Sequence[int]) -> str:
    return f"{axis} of {walkers[0]}-{walkers[-1]}" if len(walkers) < 3 else f"{axis} of {len(walkers)}"


def uses_of(programs: Sequence[Program], sizes: Sizes, stages: Stages) -> tuple[StageUse, ...]:
    """All that the lists of the pipeline ranks send along each axis."""
    found: dict[StageUse, None] = {}
    for walker, program in enumerate(programs):
        for s in program:
            if s.kind is Kind.START:
                walkers = stages.walkers(s.axis, walker)
                if s.op in (Op.SEND, Op.RECV):
                    (other,) = (member for member in walkers if member != walker)
                    walkers = (walker, other) if s.op is Op.SEND else (other, walker)
                found[s.axis, sizes.collective(s), walkers] = None
    return tuple(found)


def simulate_stages(
    programs: Sequence[Program],
    *,
    stages: Stages,
    seconds: Callable[[int, Instruction], float],
    network: Network,
    sizes: Sizes,
    host: Callable[[int, Instruction], float] | None = None,
    loads: StageLoads | None = None,
) -> Timeline:
    """One step of all pipeline ranks: rank p's list walks for all ranks of its stage.  Deadlock if it has no end.

    `seconds`, `host`: of a pipeline rank and an instruction, as of `simulate`; `loads`: of the same network, stages and uses,
    folded already."""
    loads = loads or StageLoads(network, stages, uses_of(programs, sizes, stages))
    return simulate(programs, ranks_of=stages.ranks_of, seconds=seconds, network=network, sizes=sizes, host=host, loads=loads)
