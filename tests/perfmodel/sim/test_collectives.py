"""The flows of collectives carry what the collectives must, over as few edges between nodes as their algorithms promise."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.perfmodel.sim.collectives import ALGORITHMS, Collective, Phase, phases_of

A2A, SUM, SCATTER, GATHER = Collective.ALL_TO_ALL, Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.ALL_GATHER


def sent(phases: tuple[Phase, ...], *, out: bool = True) -> Counter[int]:
    """What each rank sends or gets, in all phases."""
    counts: Counter[int] = Counter()
    for phase in phases:
        for rank, num_bytes in zip(phase.source_F if out else phase.target_F, phase.bytes_F, strict=True):
            counts[int(rank)] += num_bytes
    return counts


def between_nodes(phases: tuple[Phase, ...], ranks_per_node: int) -> Counter[tuple[int, int]]:
    """Bytes from node to node."""
    counts: Counter[tuple[int, int]] = Counter()
    for phase in phases:
        for source, target, num_bytes in zip(phase.source_F, phase.target_F, phase.bytes_F, strict=True):
            if (edge := (int(source) // ranks_per_node, int(target) // ranks_per_node))[0] != edge[1]:
                counts[edge] += num_bytes
    return counts


OF_ALL = [what for what in Collective if what is not Collective.SEND]
groups = st.sets(st.integers(0, 23), min_size=2, max_size=12).map(sorted)


@given(
    ranks=groups,
    per_node=st.integers(1, 6),
    what=st.sampled_from(OF_ALL),
    how=st.sampled_from(ALGORITHMS),
    k=st.integers(1, 3),
)
def test_everybody_gets_what_the_others_have(ranks: list[int], per_node: int, what: Collective, how: str, k: int) -> None:
    nodes = Counter(rank // per_node for rank in ranks)
    if how == "hierarchical" and 1 < len(nodes) < len(ranks) and len(set(nodes.values())) > 1:
        with pytest.raises(ValueError, match="not equally many"):
            phases_of(what, ranks, ranks_per_node=per_node, algorithm=how)
        return
    phases = phases_of(what, ranks, ranks_per_node=per_node, algorithm=how, rings=k)
    n = len(ranks)
    if what is not what.flat:  # by node, whatever the algorithm, where there are several ranks on several nodes
        by_node = len(set(nodes.values())) == 1 and 1 < len(nodes) < n
        what, how = what.flat, "hierarchical" if by_node else how
    out, came = sent(phases), sent(phases, out=False)
    assert set(out) | set(came) == set(ranks)
    assert all((p.source_F != p.target_F).all() and (p.bytes_F > 0).all() for p in phases)
    if how == "tree" and what is SUM:
        assert sum(out.values()) == pytest.approx(2 * (n - 1))  # up and down each edge of both trees
    elif how != "hierarchical":
        for rank in ranks:
            assert out[rank] == pytest.approx(what.rounds * (n - 1) / n) and came[rank] == pytest.approx(out[rank])
    if what in (SUM, GATHER) or (what is A2A and how != "hierarchical"):
        assert min(came.values()) >= (n - 1) / n - 1e-9 or how == "tree"  # nothing shorter tells them all the rest


def test_sums_by_node_leave_a_node_once_and_others_as_many_times_as_it_has_ranks() -> None:
    """Four nodes of two ranks: bytes out of a node for a tensor of one byte."""

    def out_of_a_node(what: Collective, algorithm: str) -> float:
        edges = between_nodes(phases_of(what, range(8), ranks_per_node=2, algorithm=algorithm), 2)
        return sum(num_bytes for (node, _), num_bytes in edges.items() if node == 0)

    assert out_of_a_node(SUM, "ring") == pytest.approx(2 * 7 / 8)
    assert out_of_a_node(SUM.by_node, "ring") == pytest.approx(2 * 3 / 4)
    assert out_of_a_node(SCATTER, "direct") == pytest.approx(2 * 3 / 4)
    assert out_of_a_node(SCATTER.by_node, "direct") == pytest.approx(3 / 4)
    assert out_of_a_node(GATHER.by_node, "ring") == pytest.approx(3 / 4)
    assert out_of_a_node(A2A.by_node, "direct") == pytest.approx(2 * 3 / 4)  # of what each of its ranks sends between nodes
    assert (SUM.by_node.flat, SUM.flat, A2A.by_node.flat) == (SUM, SUM, A2A)


def test_a_ring_leaves_each_node_once_and_rings_leave_it_by_different_ranks() -> None:
    (one,) = phases_of(SUM, range(8), ranks_per_node=4, algorithm="ring")
    leaving = (one.source_F // 4) != (one.target_F // 4)
    assert list(zip(one.source_F[leaving], one.target_F[leaving], strict=True)) == [(3, 4), (7, 0)]
    assert set(one.bytes_F) == {2 * 7 / 8}
    (four,) = phases_of(SUM, range(8), ranks_per_node=4, algorithm="ring", rings=4)
    leaving = (four.source_F // 4) != (four.target_F // 4)
    assert sorted(four.source_F[leaving]) == list(range(8)) == sorted(four.target_F[leaving])
    assert between_nodes((one,), 4) == pytest.approx(between_nodes((four,), 4))


def test_the_longest_chain_of_messages() -> None:
    def hops(what: Collective, how: str, ranks: int = 8, per_node: int = 4) -> list[tuple[int, int]]:
        return [(p.hops, p.fast_hops) for p in phases_of(what, range(ranks), ranks_per_node=per_node, algorithm=how)]

    assert hops(SUM, "direct") == [(2, 0)]
    assert hops(A2A, "direct", per_node=8) == [(0, 1)]
    assert hops(GATHER, "ring") == [(2, 5)]
    assert hops(SUM, "ring") == [(4, 10)]
    assert hops(SUM, "ring", per_node=1) == [(14, 0)]
    assert hops(SUM, "tree", ranks=16) == [(4, 6)]  # two levels of nodes, chains of three edges, there and back
    assert hops(SUM, "hierarchical") == [(0, 1), (2, 0), (0, 1)]


def test_trees_reach_everybody_and_who_has_children_in_one_has_none_in_the_other() -> None:
    (both,) = phases_of(SUM, range(8), ranks_per_node=1, algorithm="tree")
    up = list(zip(both.source_F[:14].tolist(), both.target_F[:14].tolist(), strict=True))
    first, second = dict(up[:7]), dict(up[7:])
    for parents in (first, second):
        (root,) = set(range(8)) - set(parents)
        for rank in range(8):
            while rank != root:
                rank = parents[rank]
    assert set(first.values()) & set(second.values()) == set()
    assert set(zip(both.target_F[14:].tolist(), both.source_F[14:].tolist(), strict=True)) == set(up)


def test_in_a_hierarchy_each_rank_carries_its_part_between_nodes() -> None:
    phases = phases_of(SUM, range(8), ranks_per_node=4, algorithm="hierarchical")
    assert between_nodes(phases, 4) == pytest.approx({(0, 1): 1.0, (1, 0): 1.0})  # 4 rings of a quarter, 2 (2 - 1) / 2 each
    inside = phases_of(SCATTER, range(8), ranks_per_node=4, algorithm="hierarchical")
    assert [sent((p,))[0] for p in inside] == pytest.approx([3 / 4, 1 / 4 * 1 / 2])
    assert [sent((p,))[0] for p in phases_of(GATHER, range(8), ranks_per_node=4, algorithm="hierarchical")] == pytest.approx(
        [1 / 4 * 1 / 2, 3 / 4]
    )


@given(seed=st.integers(0, 2**32), nodes=st.integers(1, 4), inside=st.integers(1, 4))
def test_an_uneven_all_to_all_sends_its_matrix(seed: int, nodes: int, inside: int) -> None:
    n = nodes * inside
    if n == 1:
        return
    random = np.random.default_rng(seed)
    matrix = random.integers(0, 5, (n, n)).astype(float)
    ranks = random.permutation(n).tolist()  # the matrix goes by places in the group
    want: Counter[tuple[int, int]] = Counter()
    for i, source in enumerate(ranks):
        for j, target in enumerate(ranks):
            if source // inside != target // inside and matrix[i, j]:
                want[source // inside, target // inside] += matrix[i, j]
    for how in ("direct", "hierarchical"):
        phases = phases_of(A2A, ranks, ranks_per_node=inside, algorithm=how, bytes_NN=matrix)
        assert between_nodes(phases, inside) == pytest.approx(want)
        came = sent(phases[-1:], out=False)
        for j, target in enumerate(ranks):  # what comes last is for whom it comes to
            near = [i for i, source in enumerate(ranks) if source // inside == target // inside]
            not_for_it = [j] if how == "direct" or inside == 1 or nodes == 1 else near
            assert came[target] == pytest.approx(matrix[:, j].sum() - matrix[not_for_it, j].sum())


def test_a_matrix_is_of_an_all_to_all_and_has_its_size() -> None:
    with pytest.raises(ValueError, match=r"all-reduce over 2 ranks: bytes_NN is \(2, 2\), which only all-to-all takes"):
        phases_of(SUM, (0, 1), ranks_per_node=1, bytes_NN=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"as \(3, 3\)"):
        phases_of(A2A, (0, 1, 2), ranks_per_node=1, bytes_NN=np.ones((2, 2)))
