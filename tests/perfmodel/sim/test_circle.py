"""A deadlock says who waits for whom, in a circle that really closes, or for whom everybody waits in vain."""

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.perfmodel.sim.lanes import circle_of
from megalina.perfmodel.sim.network import one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Deadlock, simulate
from megalina.step.plan import Plan
from megalina.step.program import Program
from megalina.step.strategy import Setting, training_step
from tests.perfmodel.sim.schedules import LITERAL, NAMED, SHAPES, buckets_of, delays, ranks_of, start, wait

STARTED = re.compile(r"rank (\d) has started (.+) and waits for rank (\d) to")
HOLDS = re.compile(r"rank (\d) holds (.+) back for (.+)")
LATER = re.compile(r"rank (\d) starts (.+) after (.+)")
STANDS = re.compile(r"rank (\d) stands at (.+), for (.+)")


@given(edges=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20))
def test_a_circle_is_found_if_there_is_one(edges: set[tuple[int, int]]) -> None:
    found = circle_of(range(8), lambda a: [(b, f"{a} {b}") for b in range(8) if (a, b) in edges])
    steps = [tuple(map(int, why.split())) for why in found]
    assert all(step in edges for step in steps)
    assert all(a[1] == b[0] for a, b in zip(steps, steps[1:] + steps[:1], strict=True))
    reach = set(edges)
    for k in range(8):  # Warshall
        reach |= {(a, b) for a in range(8) for b in range(8) if (a, k) in reach and (k, b) in reach}
    assert bool(found) == any((a, a) in reach for a in range(8))


def circle_in(message: str) -> list[str]:
    lines = message.splitlines()[1:]
    named = [line.removeprefix("in a circle: ").strip() for line in lines if line.startswith(("in a circle: ", "  "))]
    assert bool(named) == lines[0].startswith("in a circle: ")
    return named


def closes(circle: list[str], started: dict[int, set[str]]) -> None:
    """Each line is about what the line before it waits for, and the first one about what the last one waits for."""
    for line, after in zip(circle, circle[1:] + circle[:1], strict=True):
        if match := STARTED.fullmatch(line):
            rank, tag, other = match.groups()
            assert after.startswith(f"rank {other} ") and rank != other
            if not STANDS.fullmatch(after):
                assert f" {tag} " in after  # that very thing is what the other rank has not started
            started.setdefault(int(rank), set()).add(tag)
        else:
            rank, tag, cause = (HOLDS.fullmatch(line) or LATER.fullmatch(line) or STANDS.fullmatch(line)).groups()
            assert after.startswith(f"rank {rank} ") and f" {cause} " in after
    assert len({line.split()[1] for line in circle}) > 1


@pytest.mark.parametrize("name", ["priority_partition", "lina", "flow"])
def test_the_papers_rule_deadlocks_in_a_circle_that_is_named(name: str) -> None:
    shape = SHAPES["experts in every layer"]
    plan = Plan(name, yields=True, parts=2 if name == "flow" else 1, chunks=(2,) if name == "lina" else (1,))
    setting = Setting(shape, buckets_of(shape, piece=40), plan)
    program, found = training_step(name, setting), 0
    for seed in range(40):
        what = {"network": one_level(1e6, 1e-5), "sizes": Sizes(lambda instruction: 1000.0), "rule": LITERAL}
        try:
            simulate([program] * 4, ranks_of=ranks_of((2, 2, 1)), seconds=delays(Random(seed)), **what)
        except Deadlock as deadlock:
            closes(circle_in(str(deadlock)), {})
            found += 1
    assert found >= 4


def stuck(*programs: Program) -> str:
    with pytest.raises(Deadlock) as found:
        simulate(
            programs,
            ranks_of=lambda axis, rank: tuple(range(len(programs))),
            seconds=lambda rank, instruction: 0.0,
            network=one_level(100.0, 0.0),
            sizes=NAMED,
        )
    return str(found.value)


def test_lists_in_other_orders_wait_for_each_other() -> None:
    a, b = (start("a 100"), wait("a 100")), (start("b 100", axis="dp"), wait("b 100"))
    assert circle_in(stuck(a + b, b + a)) == [
        "rank 0 stands at F:a 100<.-.0, for F:a 100>.-.0",
        "rank 0 has started F:a 100>.-.0 and waits for rank 1 to",
        "rank 1 stands at F:b 100<.-.0, for F:b 100>.-.0",
        "rank 1 has started F:b 100>.-.0 and waits for rank 0 to",
    ]


def test_three_ranks_wait_in_one_circle() -> None:
    a, b, c = ((start(f"{x} 100", axis=f"axis{x}"), wait(f"{x} 100")) for x in "abc")
    circle = circle_in(stuck(a + b + c, b + c + a, c + a + b))
    closes(circle, {})
    assert {line.split()[1] for line in circle} >= {"0", "1"}


def test_who_waits_for_a_rank_that_is_done_waits_in_no_circle() -> None:
    a, b = (start("a 100"), wait("a 100")), (start("b 100", axis="dp"), wait("b 100"))
    message = stuck(a + b, a)
    assert circle_in(message) == []
    assert message.splitlines()[1:] == [
        "rank 0 stands at F:b 100<.-.0; lane dp: F:b 100>.-.0 has left, rank 1 has not started it",
        "rank 1 is done",
    ]
