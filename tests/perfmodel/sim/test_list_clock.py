"""The clock of lists says what virtual time says, of every strategy, network and order, also where it goes on from a stop."""

import math
from random import Random

import pytest

from megalina.perfmodel.sim.folding import FoldedLoads
from megalina.perfmodel.sim.list_clock import OPS, ListClock
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate_alike, uses_of
from megalina.step.program import Instruction, Kind, Program
from megalina.step.strategy import STRATEGIES, training_step
from tests.perfmodel.sim.schedules import LAYOUTS, SHAPES, order_of, random_network, ranks_of, setting_of
from tools.draw_strategies import EXTRA, Cluster, ladder_job

SETTINGS = {
    "light": ((), Cluster()),
    "heavy": (("model.num_heads=7", "model.num_kv_heads=7"), Cluster()),
    "fast": ((), Cluster(link_mbit=10_000, latency_ms=0.1)),
}


def marks(program: Program) -> tuple[list[int], list[tuple[int, ...]]]:
    return [s.credit for s in program], [tuple(OPS[op] for op in s.yields_to) for s in program]


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_of_the_document_take_as_long(setting: str) -> None:
    overrides, cluster = SETTINGS[setting]
    for name in STRATEGIES:
        job = ladder_job(f"strategy={name}", *EXTRA.get(name, ()), *overrides, "model.num_layers=2", cluster=cluster)
        program, step = training_step(name, job.setting), job.priced
        loads = FoldedLoads(job.network, 4, step.ranks_of, uses_of(program, step.sizes), slowest=True)
        clock = ListClock(program, seconds=step.seconds, sizes=step.sizes, loads=loads, ranks_of=step.ranks_of)
        found = clock.walk(range(len(program)), *marks(program)).step_s
        assert found == pytest.approx(job.step(program).step_s, rel=1e-12), name


def drawn(seed: int) -> tuple[ListClock, Program, float, Random]:
    """A clock and what virtual time says of the same step: any strategy in any order on any network."""
    random = Random(seed)
    layout = random.choice(LAYOUTS)
    shapes = [shape for kind, shape in SHAPES.items() if ("tensor" in kind) == (layout[2] > 1)]
    name = random.choice(list(STRATEGIES))
    program = training_step(name, setting_of(name, random.choice(shapes), random))
    if random.random() < 0.7:
        program = order_of(program, random)
    ranks, groups = math.prod(layout), ranks_of(layout)
    axes = {s.axis for s in program if s.kind is Kind.START}
    network = random_network(random, [groups(axis, rank) for axis in axes for rank in range(ranks)])
    took: dict[str, float] = {}
    size: dict[str, float] = {}

    def seconds(instruction: Instruction) -> float:
        return took.setdefault(instruction.tag, random.choice((0.0, 0.0, 0.5, 3.0, 20.0)))

    sizes = Sizes(lambda s: size.setdefault(s.tag, random.choice((10.0, 300.0, 4000.0))))
    loads = FoldedLoads(network, ranks, groups, uses_of(program, sizes), slowest=True)
    clock = ListClock(program, seconds=seconds, sizes=sizes, loads=loads, ranks_of=groups)
    timeline = simulate_alike(
        program, ranks=ranks, ranks_of=groups, seconds=seconds, network=network, sizes=sizes, loads=loads, slowest=True
    )
    return clock, program, timeline.step_s, random


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.full] * (n >= 12)) for n in range(150)])
def test_any_list_on_any_network_takes_as_long(seed: int) -> None:
    clock, program, step_s, random = drawn(seed)
    ids, held = list(range(len(program))), marks(program)
    walked = clock.walk(ids, *held)
    assert walked.step_s == pytest.approx(step_s, rel=1e-9)
    stop = random.choice(walked.stops)
    assert clock.walk(ids, *held, after=stop).step_s == walked.step_s
    assert clock.walk(ids, *held, after=stop, most_s=walked.step_s).step_s in (walked.step_s, math.inf)
    assert clock.walk(ids, *held, most_s=0.0).step_s == math.inf or step_s == 0


def test_another_order_goes_on_from_where_it_differs() -> None:
    for seed in range(4):
        clock, program, _, random = drawn(seed)
        place = {s.tag: i for i, s in enumerate(program)}
        other = [place[s.tag] for s in order_of(program, random)]
        ids = list(range(len(program)))
        cut = random.randrange(len(ids))
        mixed = [*ids[:cut], *(i for i in other if i >= cut)]  # still legal: what comes first is as it was
        walked = clock.walk(ids, *marks(program))
        stop = [s for s in walked.stops if s[0] <= cut][-1]
        assert clock.walk(mixed, *marks(program), after=stop).step_s == clock.walk(mixed, *marks(program)).step_s
