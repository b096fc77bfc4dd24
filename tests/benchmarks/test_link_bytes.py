"""The bytes of each dispatch: what competes can run, and what is told to agree does."""

import numpy as np
import pytest

from benchmarks import link_bytes
from benchmarks.link_counters import FRAME_BYTES


@pytest.mark.parametrize("shape", link_bytes.SHAPES)
def test_every_dispatch_that_a_cluster_has_is_counted(shape: str) -> None:
    cases = link_bytes.cases_of(shape, [1, 6])
    nodes, per_node = link_bytes.SHAPES[shape]
    assert len(cases) == 2 * 2 * (3 if per_node > 1 else 2)
    assert {config.parallel.ep for config, _ in cases.values()} == {nodes * per_node}


def test_a_row_is_wrong_where_a_count_differs_or_the_kernel_has_too_much() -> None:
    row = {"formula_bytes": 1000, "counted_bytes": 1000, "link_bytes": 1010 + 3 * FRAME_BYTES, "link_packets": 3}
    assert link_bytes.more(row) == pytest.approx(0.01) and not link_bytes.wrong(row)
    assert link_bytes.wrong(row | {"counted_bytes": 999})
    assert link_bytes.wrong(row | {"link_bytes": 1030 + 3 * FRAME_BYTES})
    assert link_bytes.wrong(row | {"link_bytes": 990 + 3 * FRAME_BYTES})


def test_the_formula_counts_places_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.dispatching import worker

    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)  # on the first of two nodes with two ranks
    experts = np.array([[[0, 1, 40, 41]], [[2, 20, 33, 63]]], dtype=np.int32)  # 16 experts on each rank
    found = {}
    for config, what in link_bytes.cases_of("2x2", [6]).values():
        found[what["dispatch"]] = worker._bytes_between_nodes(experts, config, per_node=2)
    token = 256 * 4
    assert found["rows"] == 4 * 4 * token  # experts 40, 41, 33, 63
    assert found["once_per_rank"] == 3 * (4 * token + 2 * 16 * 4)  # rank 2; ranks 2 and 3
    assert found["once_per_node"] == 2 * (4 * token + 2 * 32 * 4)
