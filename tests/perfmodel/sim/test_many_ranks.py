"""What is worked out for thousands of nodes at once is what a loop over them gives."""

import numpy as np
import pytest

from megalina.perfmodel.sim.collectives import _by_node, _turned
from megalina.perfmodel.sim.folding import _dense, _dense_rows


@pytest.mark.parametrize("per_node", [1, 3, 8])
@pytest.mark.parametrize("ranks", [range(24), [5, 0, 17, 9, 3, 23], [*range(0, 24, 2), 1]], ids=str)
def test_ranks_by_node_and_rings_are_those_of_a_loop(ranks, per_node: int) -> None:
    rank_N = np.array(ranks)
    node_N = rank_N // per_node
    by_node = [rank_N[node_N == node] for node in np.unique(node_N)]
    found = _by_node(rank_N, node_N)
    assert [row.tolist() for row in found] == [row.tolist() for row in by_node]
    for k in range(4):
        loop = np.concatenate([np.roll(row, -(k * len(row) // 4)) for row in by_node])
        assert _turned(found, k, 4).tolist() == loop.tolist()


def test_rows_are_numbered_as_each_alone() -> None:
    values = np.random.default_rng(0).integers(0, 6, (50, 9))
    assert _dense_rows(values).tolist() == [_dense(row).tolist() for row in values]
