"""Ranks for tests: forked for a job, gone after it."""

from collections.abc import Callable
from typing import Any

from megalina.rank_pool import TIME_LIMIT_S, RankPool, RanksFailed

PRELOAD = (  # what takes long to import, of all tests: one server forks the ranks of all
    *("pytest", "hypothesis", "matplotlib.figure", "torch.distributed.checkpoint"),
    *("megalina.train.trainer", "megalina.serve.engine", "megalina.worker", "megalina.verify.on_ranks", "tests.train.small_run"),
)


def run_on_ranks(world: int, work: Callable[..., Any], *arguments: Any, time_limit_s: float = TIME_LIMIT_S) -> list[Any]:
    """`work(*arguments)` on each of `world` new ranks; their results in order.

    RanksFailed with the traceback of the first rank that fails, or how a rank ended that did not end well."""
    with RankPool(time_limit_s=time_limit_s, preload=PRELOAD) as pool:
        results = pool.run(world, work, *arguments)
        if said := pool.close():
            raise RanksFailed("; ".join(said))
    return results
