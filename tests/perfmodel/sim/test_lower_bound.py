"""No list beats its lower bound, and one that is a single chain meets it."""

from random import Random

import pytest

from megalina.perfmodel.sim.lower_bound import lower_bound
from megalina.perfmodel.sim.network import Network, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate
from megalina.step.forward import plain
from megalina.step.program import Kind
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
