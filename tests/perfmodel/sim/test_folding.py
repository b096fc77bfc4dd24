"""One rank that walks for all sees what all see, and takes no longer for more of them."""

import time
from random import Random

import numpy as np
import pytest

from megalina.blocks.model import plain_shape
from megalina.layout import axis_of_group, rows
from megalina.perfmodel.sim.collectives import Collective
from megalina.perfmodel.sim.folding import FoldedLoads
from megalina.perfmodel.sim.lanes import OURS
from megalina.perfmodel.sim.network import Network, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import RanksOf, Timeline, simulate, simulate_alike
from megalina.step.forward import plain
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Instruction, Kind, Op, Program
from megalina.step.strategy import STRATEGIES, Setting, training_step
from tests.perfmodel.sim.schedules import LITERAL, SHAPES, setting_of

SIZES = Sizes(lambda s: 4.0 * max(10, s.piece[1] - s.piece[0]))


def groups_of(edp: int, ep: int, tp: int = 1) -> RanksOf:
    table = rows({"edp": edp, "ep": ep, "tp": tp})
    found = {(axis, rank): tuple(row) for axis, groups in table.items() for row in groups for rank in row}
    return lambda axis, rank: found[axis, rank]


def both(program: Program, network: Network, ranks_of: RanksOf, seed: int, **more: object) -> tuple[Timeline, Timeline]:
    """Eight ranks, with one of them walking for all, and with all of them; durations are drawn."""
    random = Random(seed)
    durations = {id(s): random.uniform(1e-4, 3e-2) if s.kind is Kind.COMPUTE else 0.0 for s in program}
    what = {"ranks_of": ranks_of, "network": network, "sizes": SIZES}
    one = simulate_alike(program, ranks=8, seconds=lambda s: durations[id(s)], **what, **more)
    return one, simulate([program] * 8, seconds=lambda rank, s: durations[id(s)], **what)


NETWORKS = {  # nodes of 4 and of 2; rates so that the wire takes as long as the devices
    "cards of nodes, rings by flow": {"rings": "all"},
    "cards of ranks behind ports": {"rings": "all", "nics": "all", "nic_behind_port": True, "latency_s": 1e-4},
    "collectives share": {"rings": "all", "share": "collective", "hop_s": 1e-4},
    "hierarchy, tokens first": {"algorithm": "hierarchical", "first": ((Op.TOKENS,),), "fast_hop_s": 1e-5},
    "direct, hierarchical all-to-alls, a core": {
        "algorithm": "direct",
        "all_to_all": "hierarchical",
        "nodes_per_group": 1,
        "oversubscription": 3.0,
    },
}
QUICK_NETWORKS = ("cards of ranks behind ports", "hierarchy, tokens first", "direct, hierarchical all-to-alls, a core")


def network_of(name: str, per_node: int, rate: float = 2e4) -> Network:
    numbers = dict(NETWORKS[name])
    rings, nics = (per_node if numbers.pop(key, 1) == "all" else 1 for key in ("rings", "nics"))
    fixed = {"nic_bytes_per_s": rate, "fast_bytes_per_s": 3 * rate, "ranks_per_node": per_node}
    return Network(**fixed, rings=rings, nics_per_node=nics, **numbers)


def spans(timeline: Timeline, rank: int) -> dict[tuple[str, str, str], float]:
    """When each instruction was asked for, began and ended."""
    events = timeline.events(rank)
    return {(e.kind, e.tag, which): getattr(e, which) for e in events for which in ("enqueued_s", "start_s", "end_s")}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK_NETWORKS)) for name in NETWORKS]
)
@pytest.mark.parametrize(("nodes", "per_node"), [pytest.param(4, 2, marks=pytest.mark.full), (2, 4)])
def test_one_rank_for_all_sees_what_all_see(name: str, nodes: int, per_node: int) -> None:
    for i, strategy in enumerate(STRATEGIES):
        tp = i % 2 == 0
        shape = SHAPES["tensor parallel, shared experts" if tp else "three layers, statistics of all ranks"]
        setting = setting_of(strategy, shape, Random(i))
        ranks_of = groups_of(2, 2, 2) if tp else groups_of(1, 8)
        one, every = both(training_step(strategy, setting), network_of(name, per_node), ranks_of, seed=i)
        assert one.step_s == pytest.approx(every.step_s, rel=1e-9)
        for rank in (0, 5):
            assert spans(one, 0) == pytest.approx(spans(every, rank), rel=1e-9)


def test_one_rank_for_all_is_told_what_holds_it_up() -> None:
    program = (
        Instruction("F", Kind.START, "g", writes=("g>",), op=Op.GRADS, axis="dp"),
        Instruction("F", Kind.COMPUTE, "x"),
        Instruction("F", Kind.START, "t", writes=("t>",), op=Op.TOKENS, axis="ep", reads=("g>",)),
        Instruction("F", Kind.WAIT, "t", reads=("t>",), op=Op.TOKENS, axis="ep"),
        Instruction("F", Kind.WAIT, "g", reads=("g>",), op=Op.GRADS, axis="dp"),
    )
    what = {"ranks": 4, "ranks_of": groups_of(2, 2), "seconds": lambda s: 1.0, "network": one_level(10, 0), "sizes": SIZES}
    assert simulate_alike(program, **what, rule=OURS).ledger == {
        ("dp", (0, 1, 2, 3)): {0: ["F:g>.-.0"]},
        ("ep", (0, 1)): {0: ["F:t>.-.0"]},
    }
    assert simulate_alike(program, **what, rule=LITERAL).step_s > 0  # alike, nobody waits for another


def test_groups_that_meet_other_things_are_refused_or_end_with_the_slowest() -> None:
    """One ring leaves each node by its last rank and comes by its first; these ranks' groups have it beside them."""
    setting = setting_of("eager", SHAPES["experts in every layer"], Random(1))
    program = training_step("eager", setting)
    network = Network(nic_bytes_per_s=2e4, ranks_per_node=4, nics_per_node=4)
    with pytest.raises(ValueError, match="along axis .*: its groups share links with different things: simulate every rank"):
        both(program, network, groups_of(2, 4), seed=0)
    one, every = both(program, network, groups_of(2, 4), seed=0, slowest=True)
    assert every.step_s * (1 - 1e-9) <= one.step_s < 1.1 * every.step_s


def test_ranks_that_are_not_alike_are_refused() -> None:
    program = (Instruction("F", Kind.START, "t", writes=("t>",), op=Op.TOKENS, axis="ep"),)
    what = {"seconds": lambda s: 1.0, "network": one_level(10, 0), "ranks": 3}
    with pytest.raises(ValueError, match=r"axis ep has groups of \[1, 2\] ranks"):
        simulate_alike(program, ranks_of=lambda axis, rank: (0, 1) if rank < 2 else (2,), sizes=SIZES, **what)
    uneven = Sizes(SIZES.bytes_of, matrix_of=lambda instruction, ranks: np.ones((3, 3)))
    with pytest.raises(ValueError, match="ranks send different sizes"):
        simulate_alike(program, ranks_of=lambda axis, rank: (0, 1, 2), sizes=uneven, **what)


def test_what_all_links_carry_together_is_kept() -> None:
    network = Network(nic_bytes_per_s=10, fast_bytes_per_s=30, ranks_per_node=4, nics_per_node=2, rings=4)
    folded = FoldedLoads(network, 16, groups_of(2, 8), [("ep", Collective.ALL_TO_ALL), ("dp", Collective.ALL_REDUCE)])
    (load,) = folded.of("ep", Collective.ALL_TO_ALL, tuple(range(8)))
    carried = load.bytes_on(len(folded.capacity_L))
    assert sorted(zip(folded.capacity_L, carried, strict=True)) == [
        (10, pytest.approx(2 * 4 / 8)),  # a card: two ranks, four others on the other node
        (30, pytest.approx(3 / 8)),  # a port
    ]


def test_a_step_of_48_layers_on_1024_ranks_takes_seconds() -> None:
    """On one core; 128 experts, eight ranks a node."""
    shape = plain_shape(moe=(True,) * 48, shared_experts=True)
    names = dict.fromkeys(u for s in plain(shape) for u in s.uses)
    buckets = {name: BucketSpec(2**22, axis_of_group(name), True, 2**20) for name in names}
    program = training_step("lina", Setting(shape, buckets, Plan(yields=True, chunks=(2,))))
    network = Network(nic_bytes_per_s=50e9, ranks_per_node=8, nics_per_node=8, fast_bytes_per_s=4e11, rings=8, hop_s=5e-6)
    ranks_of, began_s = groups_of(8, 128), time.process_time()
    timeline = simulate_alike(
        program, ranks=1024, ranks_of=ranks_of, seconds=lambda s: 1e-3 * (s.kind is Kind.COMPUTE), network=network, sizes=SIZES
    )
    assert time.process_time() - began_s < 5  # up to 1.0 s, beside other work 2.3; there are 16 million flows
    assert timeline.step_s >= 1e-3 * sum(s.kind is Kind.COMPUTE for s in program)


FEW = {  # nodes of 4, two nodes below a port of the core
    "by flow": {"nics_per_node": 4, "rings": 4},
    "by flow, unequal cards": {"nics_per_node": 3, "rings": 1},
    "collectives share": {"nics_per_node": 4, "rings": 4, "share": "collective"},
    "a core, all direct": {"nics_per_node": 2, "nodes_per_group": 2, "oversubscription": 3.0, "algorithm": "direct"},
    "hierarchical": {"all_to_all": "hierarchical", "algorithm": "hierarchical"},
    "ports behind": {"nics_per_node": 4, "nic_behind_port": True, "algorithm": "direct"},
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(("edp", "ep"), [(1, 16), (2, 8), (4, 4), (8, 2)])
def test_a_few_flows_that_stand_for_many_make_the_same_step(
    monkeypatch: pytest.MonkeyPatch, name: str, edp: int, ep: int
) -> None:
    network = Network(nic_bytes_per_s=2e4, fast_bytes_per_s=6e4, ranks_per_node=4, **FEW[name])
    program = training_step("flow", setting_of("flow", SHAPES["three layers, statistics of all ranks"], Random(3)))
    what = {"ranks": 16, "ranks_of": groups_of(edp, ep), "seconds": lambda s: 1e-3, "network": network, "sizes": SIZES}
    few = simulate_alike(program, **what, slowest=True)
    phases = Network.phases
    monkeypatch.setattr(Network, "phases", lambda self, what, ranks, *, few: phases(self, what, ranks))  # all of them
    assert few.step_s == pytest.approx(simulate_alike(program, **what, slowest=True).step_s, rel=1e-9)


@pytest.mark.parametrize("share", [pytest.param("flow", marks=pytest.mark.full), "collective"])
def test_all_to_alls_among_thousands_are_folded_in_a_moment(share: str) -> None:
    network = Network(
        nic_bytes_per_s=50e9, fast_bytes_per_s=4e11, ranks_per_node=8, nics_per_node=8, rings=8, algorithm="direct", share=share
    )
    began_s = time.process_time()
    folded = FoldedLoads(network, 4096, groups_of(1, 4096), [("ep", Collective.ALL_TO_ALL), ("world", Collective.ALL_REDUCE)])
    assert time.process_time() - began_s < 5  # up to 1.0 s, beside other work 2.3; there are 16 million flows
    (load,) = folded.of("ep", Collective.ALL_TO_ALL, ())
    carried = load.bytes_on(len(folded.capacity_L))
    assert dict(zip(folded.capacity_L.tolist(), carried.tolist(), strict=True)) == {
        50e9: pytest.approx(4088 / 4096),
        4e11: pytest.approx(7 / 4096),
    }


def test_too_many_flows_are_refused() -> None:
    network = Network(nic_bytes_per_s=1.0, ranks_per_node=8)
    with pytest.raises(ValueError, match=r"4095 x 4095 flows, too many to follow one by one: choose hierarchical"):
        FoldedLoads(network, 4095, lambda axis, rank: tuple(range(4095)), [("ep", Collective.ALL_TO_ALL)])


def test_flows_between_unequal_cards_are_followed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card that two ranks share sends to all others, not to its like alone."""
    network = Network(nic_bytes_per_s=10, ranks_per_node=4, nics_per_node=3)

    def told() -> list[tuple[float, ...]]:
        (load,) = FoldedLoads(network, 16, groups_of(1, 16), [("ep", Collective.ALL_TO_ALL)]).of("ep", Collective.ALL_TO_ALL, ())
        places = zip(load.bundle_I.tolist(), load.link_I.tolist(), load.weight_I.tolist(), strict=True)
        return sorted((float(load.amount_B[b]), link, weight) for b, link, weight in places)

    found, phases = told(), Network.phases
    monkeypatch.setattr(Network, "phases", lambda self, what, ranks, *, few: phases(self, what, ranks))
    assert len(found) == 4 and found == told()  # between shared cards, between the others, and between one and the other
