"""A searched list for a verification, in which nothing is measured: by guessed times, a few walks in virtual time.

It is an odd list on purpose, with chunks, and with deferred weights that are joined: what the checker accepts must be right
whatever the order."""

from dataclasses import replace

from megalina.layout import ranks_of
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.sim.folding import FoldedLoads
from megalina.perfmodel.sim.list_clock import ListClock
from megalina.perfmodel.sim.list_search import Start, search
from megalina.perfmodel.sim.network import one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import uses_of
from megalina.step.list_scheduling import guessed
from megalina.step.program import Kind, Program
from megalina.step.strategy import training_step

WALKS = 20


def walk_searched_list(trainable: Trainable, *, seed: int) -> None:
    """From now on a step of `trainable` walks it.  Pure, so all ranks that call it walk the same."""
    mesh, setting = trainable.mesh, trainable.setting
    groups, sizes = ranks_of(mesh.shape), Sizes(lambda instruction: guessed(instruction))
    network = one_level(1.0, 0.0)

    def clock_of(program: Program) -> ListClock:
        loads = FoldedLoads(network, mesh.world.size, groups, uses_of(program, sizes), slowest=True)
        seconds = lambda s: guessed(s) if s.kind is Kind.COMPUTE else 0.0  # noqa: E731
        return ListClock(program, seconds=seconds, sizes=sizes, loads=loads, ranks_of=groups)

    plan = replace(setting.plan, deferred_weights="all", join_weights=True, chunks=(2,))
    start = Start(plan, training_step(plan.strategy, setting.under(plan)))
    trainable.adopt(search([start], clock_of, evaluations=WALKS, seed=seed).plan)
