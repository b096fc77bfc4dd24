"""Weights: what is no all-to-all may get more of a link than its share; bytes stay bytes."""

import pytest

from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate
from megalina.step.program import Instruction, Kind, Op


def start(name: str, op: Op, axis: str) -> Instruction:
    return Instruction("F", Kind.START, name, op=op, axis=axis, writes=(name,))


def wait(name: str, op: Op, axis: str) -> Instruction:
    return Instruction("F", Kind.WAIT, name, op=op, axis=axis, reads=(name,), writes=(f"{name}!",))


def ends_s(weight: float, *, share: str = "flow", alone: bool = False) -> dict[str, float]:
    """Two nodes with cards of 100 bytes a second; 400 bytes of tokens and 200 of a sum leave each of them."""
    tokens, total = (start("tokens", Op.TOKENS, "ep"), start("sum", Op.SUM, "dp"))
    sent = (total,) if alone else (tokens, total)
    waits = [wait(s.name, s.op, s.axis) for s in sent if s.op is not None]
    timeline = simulate(
        [(*sent, *waits)] * 2,
        ranks_of=lambda axis, rank: (0, 1),
        seconds=lambda rank, instruction: 0.0,
        network=Network(nic_bytes_per_s=100, weight=weight, share=share),
        sizes=Sizes(lambda instruction: 800.0 if instruction.op is Op.TOKENS else 200.0),
    )
    return {e.name: e.end_s for e in timeline.events(0) if e.kind == "send"}


@pytest.mark.parametrize("share", ["flow", "collective"])
def test_a_weight_divides_the_link_and_wastes_nothing_of_it(share: str) -> None:
    assert ends_s(1.0, share=share) == pytest.approx({"sum": 4.0, "tokens": 6.0})
    assert ends_s(3.0, share=share) == pytest.approx({"sum": 200 / 75, "tokens": 6.0})
    assert ends_s(0.25, share=share)["tokens"] == pytest.approx(5.0)  # 80 bytes a second
    assert ends_s(7.0, share=share, alone=True) == pytest.approx({"sum": 2.0})


def test_a_direct_reduce_scatter_is_an_all_to_all() -> None:
    """Four ranks, two a node: each rank sends a quarter to each of the two on the other node, and has no weight."""
    scattered = Instruction("B", Kind.START, "scatter", op=Op.SCATTER, axis="tp", writes=("s",))
    awaited = Instruction("B", Kind.WAIT, "scatter", op=Op.SCATTER, axis="tp", reads=("s",), writes=("s!",))

    def end_s(**settings: str) -> float:
        return simulate(
            [(scattered, awaited)] * 4,
            ranks_of=lambda axis, rank: (0, 1, 2, 3),
            seconds=lambda rank, instruction: 0.0,
            network=Network(nic_bytes_per_s=100, ranks_per_node=2, weight=3.0, **settings),
            sizes=Sizes(lambda instruction: 800.0),
        ).step_s

    assert end_s() == pytest.approx(6.0)  # a ring: three quarters leave by one rank
    assert end_s(reduce_scatter="direct") == pytest.approx(8.0)
    assert end_s(reduce_scatter="direct") == pytest.approx(end_s(algorithm="direct"))


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_must_be_one(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Network(nic_bytes_per_s=1, weight=weight)
