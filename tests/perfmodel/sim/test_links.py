"""Over a whole simulated step, whatever the algorithm: all bytes arrive, no link is ever too full, and none idles needlessly."""

from collections import Counter
from collections.abc import Hashable, Mapping
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.perfmodel.sim import virtual
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Timeline, simulate
from megalina.step.program import Instruction, Kind, Program
from megalina.step.strategy import STRATEGIES, training_step
from tests.perfmodel.sim.fluid import way
from tests.perfmodel.sim.schedules import SHAPES, delays, random_network, ranks_of, setting_of
from tests.perfmodel.sim.watched_links import WatchedTraffic
from tests.profiles import examples

LAYOUT = (2, 2, 1)


def step_on(monkeypatch: pytest.MonkeyPatch, program: Program, **what: object) -> tuple[Timeline, WatchedTraffic]:
    """On watched links."""
    made: list[WatchedTraffic] = []

    def watched(capacity_L: np.ndarray) -> WatchedTraffic:
        made.append(WatchedTraffic(capacity_L))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(virtual, "Traffic", watched)
        timeline = simulate([program] * 4, ranks_of=ranks_of(LAYOUT), **what)
    return timeline, made[0]


def carried(network: Network, ranks: int, carried_L: np.ndarray) -> dict[Hashable, float]:
    """By the links' names."""
    nodes = -(-ranks // network.ranks_per_node)
    cards = [(node, card) for node in range(nodes) for card in range(network.nics_per_node)]
    groups = range(-(-nodes // network.nodes_per_group) if network.nodes_per_group else 0)
    names: list[Hashable] = [(f"port {way}", rank) for way in ("out", "in") for rank in range(ranks)]
    names += [(f"nic {way}", *card) for way in ("out", "in") for card in cards]
    names += [(way, group) for way in ("up", "down") for group in groups]
    return {name: size for name, size in zip(names, carried_L.tolist(), strict=True) if size}


def expected(network: Network, program: Program, sizes: Sizes) -> Mapping[Hashable, float]:
    """What the flows of all collectives put on each link."""
    bytes_on: Counter[Hashable] = Counter()
    for instruction in (s for s in program if s.kind is Kind.START):
        for group in {ranks_of(LAYOUT)(instruction.axis, rank) for rank in range(4)}:
            if len(group) == 1:
                continue
            what, num_bytes, bytes_NN = sizes.sent(instruction, group)
            for phase in network.phases(what, group, bytes_NN):
                for source, target, part in zip(phase.source_F, phase.target_F, phase.bytes_F, strict=True):
                    for link in way(network, int(source), int(target)):
                        bytes_on[link] += float(part) * num_bytes
    return bytes_on


def sizes_of(random: Random, program: Program, *, uneven: bool) -> Sizes:
    size = {instruction: random.choice((10.0, 300.0, 4000.0)) for instruction in program if instruction.kind is Kind.START}
    matrices: dict[tuple[Instruction, tuple[int, ...]], np.ndarray] = {}

    def matrix_of(instruction: Instruction, ranks: tuple[int, ...]) -> np.ndarray:
        if (instruction, ranks) not in matrices:
            drawn = [[random.choice((0.0, 50.0, 900.0)) for _ in ranks] for _ in ranks]
            matrices[instruction, ranks] = np.array(drawn)
        return matrices[instruction, ranks]

    return Sizes(size.__getitem__, matrix_of=matrix_of if uneven else None)


def arrives(monkeypatch: pytest.MonkeyPatch, seed: int, name: str, shape: str, *, uneven: bool) -> int:
    """Simulate a random step of a random network and compare; how often rates changed."""
    random = Random(seed)
    program = training_step(name, setting_of(name, SHAPES[shape], random))
    groups = {ranks_of(LAYOUT)(s.axis, rank) for s in program if s.kind is Kind.START for rank in range(4)}
    network, sizes = random_network(random, groups), sizes_of(random, program, uneven=uneven)
    _, traffic = step_on(monkeypatch, program, seconds=delays(random), network=network, sizes=sizes)
    found = carried(network, 4, traffic.carried_L)
    assert found == pytest.approx(expected(network, program, sizes), rel=1e-7)
    for out, into in (("port out", "port in"), ("nic out", "nic in"), ("up", "down")):
        left, came = (sum(size for link, size in found.items() if link[0] == name) for name in (out, into))
        assert left == pytest.approx(came)
    assert not traffic.moving
    return traffic.moments


drawn = {"name": st.sampled_from(list(STRATEGIES)), "shape": st.sampled_from([s for s in SHAPES if "tensor" not in s])}


@pytest.mark.full
@given(seed=st.integers(0, 2**32), uneven=st.booleans(), **drawn)
def test_what_leaves_arrives_and_links_are_never_too_full_nor_idle(seed: int, name: str, shape: str, uneven: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert arrives(monkeypatch, seed, name, shape, uneven=uneven) > 10


@pytest.mark.full
@examples(1.5)
@given(seed=st.integers(0, 2**32), uneven=st.booleans(), **drawn)
def test_what_leaves_arrives_in_hundreds_of_steps(seed: int, name: str, shape: str, uneven: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert arrives(monkeypatch, seed, name, shape, uneven=uneven) > 10
