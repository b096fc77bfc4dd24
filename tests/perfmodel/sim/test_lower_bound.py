"""No list beats its lower bound, and one that is a single chain meets it."""

from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from megalina.perfmodel.sim.lower_bound import in_turn_s, lower_bound
from megalina.perfmodel.sim.network import Network, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate
from megalina.step.forward import plain
from megalina.step.program import Instruction, Kind, Op
from megalina.step.strategy import STRATEGIES, training_step
from tests.perfmodel.sim.schedules import NAMED, SHAPES, compute, delays, ranks_of, setting_of, start, wait


def test_the_bound_of_a_small_list_is_that_of_its_three_parts() -> None:
    program = (
        compute("x 1", writes="x"),
        start("a 200", reads="x"),
        compute("y 1"),
        wait("a 200", writes="a"),
        start("b 400", reads="x", axis="dp"),
        compute("z 2", reads="a", writes="z"),
        wait("b 400"),
    )
    what = {
        "ranks_of": lambda axis, rank: (0, 1),
        "seconds": lambda rank, s: float(s.name.split()[1]) * (1 + rank) if s.kind is Kind.COMPUTE else 0.0,
        "network": one_level(100.0, 0.5),
        "sizes": NAMED,
    }
    bound = lower_bound([program] * 2, **what)
    assert bound == {"compute_s": 8.0, "link_s": 3.0, "critical_path_s": 2 + 1.5 + 4, "bound_s": 8.0}
    assert simulate([program] * 2, **what).step_s >= 8


def test_a_list_that_is_one_chain_takes_as_long_as_its_critical_path() -> None:
    forward = plain(SHAPES["experts in every layer"])
    what = {"ranks_of": ranks_of((1, 4, 1)), "network": one_level(1e6, 1e-3), "sizes": Sizes(lambda s: 5000.0)}
    seconds = delays(Random(0))
    alike = {"seconds": lambda rank, s: seconds(0, s) if s.kind is Kind.COMPUTE else 0.0, **what}
    took_s = simulate([forward] * 4, **alike).step_s
    assert took_s == pytest.approx(lower_bound([forward] * 4, **alike)["critical_path_s"])


@pytest.mark.parametrize("share", ["flow", "collective"])
def test_no_strategy_beats_the_bound_on_a_hierarchy_of_links(share: str) -> None:
    for seed, name in enumerate(STRATEGIES):
        random = Random(seed)
        setting = setting_of(name, SHAPES["experts in every layer"], random)
        program = training_step(name, setting)
        network = Network(nic_bytes_per_s=3e3, ranks_per_node=2, fast_bytes_per_s=5e3, hop_s=1e-3, share=share)
        sizes = Sizes(lambda s: 4.0 * max(10, s.piece[1] - s.piece[0]))
        what = {"ranks_of": ranks_of((2, 2, 1)), "seconds": delays(random, (0.0, 1e-3)), "network": network, "sizes": sizes}
        bound = lower_bound([program] * 4, **what)
        assert bound["bound_s"] == pytest.approx(max(bound["link_s"], bound["critical_path_s"]))
        assert bound["bound_s"] * (1 - 1e-9) <= simulate([program] * 4, **what).step_s < 3 * bound["bound_s"]


def test_a_link_waits_for_what_comes_before_and_leaves_what_comes_after() -> None:
    """x 1 s, then a on the link for 2 s, then z 2 s; b for 4 s needs y, which is computed after x or before it: 3 s."""
    program = (
        compute("x 1", writes="x"),
        compute("y 3", writes="y"),
        start("a 200", reads="x"),
        start("b 400", reads="y", axis="dp"),
        wait("a 200", writes="a"),
        compute("z 2", reads="a", writes="z"),
        wait("b 400"),
    )

    def found() -> float:
        return in_turn_s(
            program,
            seconds=lambda s: float(s.name.split()[1]),
            link_s=lambda s: float(s.name.split()[1]) / 100,
        )

    assert found() == 7.0  # both: 1 before the first, 6 on the link; b alone: 3 and 4
    program = (*program[:1], compute("y 3", reads="x", writes="y"), *program[2:])
    assert found() == 8.0  # now x and y come before b: 4 and 4


@pytest.mark.parametrize("strategy", ["eager", "flow", "lancet", "fixed", "serial"])
def test_no_order_beats_the_bound_of_one_link(strategy: str) -> None:
    """Of ranks that are alike, each with a link of its own; it is no less than all that a link carries."""
    tighter = 0
    for seed in range(6):
        random = Random(seed)
        program = training_step(strategy, setting_of(strategy, SHAPES["experts in every layer"], random))
        rate, delay = random.choice((2e3, 2e4, 2e5)), delays(random)
        sizes = Sizes(lambda s: 4.0 * max(10, s.piece[1] - s.piece[0]))
        of_compute = partial(_of_compute, delay)
        what = {"ranks_of": ranks_of((1, 4, 1)), "network": one_level(rate, 0.0), "sizes": sizes}
        what["seconds"] = lambda rank, s, took=of_compute: took(s)
        carried_s = lower_bound([program] * 4, **what)["link_s"]
        bound_s = in_turn_s(program, seconds=of_compute, link_s=partial(_on_ring, sizes, rate))
        assert carried_s * (1 - 1e-9) <= bound_s <= simulate([program] * 4, **what).step_s * (1 + 1e-9)
        tighter += bound_s > carried_s * 1.01
    assert tighter >= 3


def _of_compute(delay: Callable[[int, Instruction], float], instruction: Instruction) -> float:
    return delay(0, instruction) if instruction.kind is Kind.COMPUTE else 0.0


def _on_ring(sizes: Sizes, rate: float, instruction: Instruction) -> float:
    ranks = ranks_of((1, 4, 1))(instruction.axis, 0)
    rounds = 2 if instruction.op in (Op.GRADS, Op.SUM) else 1
    return rounds * sizes.sent(instruction, ranks)[1] * (len(ranks) - 1) / len(ranks) / rate
