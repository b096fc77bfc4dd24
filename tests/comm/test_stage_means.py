"""Means over the ranks of each stage, which follow one another in the world."""

from megalina.collective_log import CollectiveLog
from megalina.comm.stage_means import stage_means
from tests.parallel.thread_ranks import meshes, on_threads


def test_means_are_of_the_ranks_of_each_stage() -> None:
    of_ranks = meshes(6, tp=1, ep=3, pp=2, across={})
    log = [CollectiveLog(rank, alike=False) for rank in range(6)]
    found = on_threads(6, lambda rank: stage_means(of_ranks[rank], log[rank], [float(rank), 10.0 * rank]))
    assert found == [[[1.0, 4.0], [10.0, 40.0]]] * 6
