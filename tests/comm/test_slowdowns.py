"""Slowdowns of made-up events on four ranks: two groups for tokens, one for gradients."""

from megalina.collective_log import CollectiveLog
from megalina.comm.slowdowns import slowdowns
from megalina.mesh import build_mesh
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.timeline.contention import Alone
from tests.parallel.ranks import run_on_ranks
from tests.timeline.made import compute, grads, tokens

ALONE = {"tokens": Alone(0.0, 0.01), "grads": Alone(0.5, 0.0)}
PROGRAM: Program = (
    Instruction("F", Kind.COMPUTE, "route", 0),
    Instruction("F", Kind.START, "dispatch", 0, op=Op.TOKENS, axis="ep"),
    Instruction("F", Kind.START, "combine", 0, op=Op.TOKENS, axis="ep"),
    Instruction("B", Kind.START, "dense.0", op=Op.GRADS, axis="dp"),
    Instruction("B", Kind.START, "experts.0", op=Op.GRADS, axis="copies"),  # nobody calibrates that
)


def _seen() -> dict[str, float]:
    mesh = build_mesh(ep=2)
    rank = mesh.world.rank
    began_s = 1000.0 * rank  # every rank has a clock of its own
    events = [
        compute("route", began_s, began_s + 1, layer=0),
        tokens("dispatch", began_s, began_s + 8 - rank, 100, layer=0),
        grads("dense.0", began_s, began_s + 2 + rank, 500),
        grads("experts.0", began_s, began_s + 1, 7, axis="copies"),
    ]
    if rank == 3:  # the other's word on it is not there in time
        events.append(tokens("combine", began_s, began_s + 9, 300, layer=0))
    return slowdowns(mesh, CollectiveLog(mesh.world.rank), PROGRAM, events, ALONE)


def test_each_group_agrees_on_the_smallest() -> None:
    first, second, third, fourth = run_on_ranks(4, _seen)
    assert first == second == {"F:dispatch>.0.0": 7.0, "B:dense.0>.-.0": 4.0}
    assert third == fourth == {"F:dispatch>.0.0": 5.0, "F:combine>.0.0": 3.0, "B:dense.0>.-.0": 4.0}


def test_alone_there_is_nobody_to_ask() -> None:
    assert slowdowns(build_mesh(), CollectiveLog(0), PROGRAM, [tokens("dispatch", 0, 1)], ALONE) == {}
