"""A host with a clock of its own: it changes nothing where it takes no time, and is seen where the device has nothing to do."""

from random import Random

import pytest

from megalina.perfmodel.sim.network import Network, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate, simulate_alike
from megalina.step.program import Instruction, Kind, Op
from megalina.step.strategy import STRATEGIES, training_step
from tests.perfmodel.sim.schedules import SHAPES, delays, ranks_of, setting_of

SIZES = Sizes(lambda s: 100.0)
SMALL_S = 0.5
PROGRAM = (
    Instruction("F", Kind.START, "t", writes=("t>",), op=Op.TOKENS, axis="ep"),
    Instruction("F", Kind.COMPUTE, "large"),
    Instruction("F", Kind.WAIT, "t", reads=("t>",), writes=("t",), op=Op.TOKENS, axis="ep"),
    Instruction("F", Kind.COMPUTE, "small", reads=("t",)),
    Instruction("F", Kind.COMPUTE, "last"),
)


def step_s(large_s: float, small_s: float) -> float:
    """The wire takes 10 s; the host needs `small_s` for the small instruction, for which the device needs nothing."""
    device_s, host_s = {"large": large_s, "last": 1.0}, {"small": small_s}
    return simulate_alike(
        PROGRAM,
        ranks=2,
        ranks_of=lambda axis, rank: (0, 1),
        seconds=lambda s: device_s.get(s.name, 0.0),
        network=one_level(5.0, 0.0),  # half of the 100 bytes leaves a rank
        sizes=SIZES,
        host=lambda s: host_s.get(s.name, 0.0),
    ).step_s


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_host_that_takes_no_time_changes_none(name: str) -> None:
    for seed in range(3):
        random = Random(f"{name} {seed}")
        program = training_step(name, setting_of(name, SHAPES["dense first, shared experts"], random))
        seconds = delays(random)
        what = {
            "ranks_of": ranks_of((2, 2, 1)),
            "seconds": lambda rank, s, seconds=seconds: seconds(rank, s) if s.kind is Kind.COMPUTE else 0.0,
            "network": Network(nic_bytes_per_s=2e4, ranks_per_node=2, fast_bytes_per_s=6e4, hop_s=1e-4),
            "sizes": SIZES,
        }
        plain, hosted = simulate([program] * 4, **what), simulate([program] * 4, **what, host=lambda rank, s: 0.0)
        assert hosted.step_s == pytest.approx(plain.step_s, rel=1e-9)
        assert hosted.ledger == plain.ledger


def test_small_math_after_a_wait_is_exposed() -> None:
    assert step_s(2.0, SMALL_S) == pytest.approx(step_s(2.0, 0.0) + SMALL_S) == pytest.approx(10.0 + SMALL_S + 1.0)


def test_small_math_under_a_busy_device_is_not() -> None:
    assert step_s(20.0, SMALL_S) == pytest.approx(step_s(20.0, 0.0)) == pytest.approx(21.0)
    assert step_s(10.2, SMALL_S) == pytest.approx(10.0 + SMALL_S + 1.0)  # the part that the device does not cover


def test_a_host_may_be_slower_than_its_device() -> None:
    assert step_s(2.0, 30.0) == pytest.approx(10.0 + 30.0 + 1.0)
