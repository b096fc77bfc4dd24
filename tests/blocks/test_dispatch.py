"""parallel.dispatch=auto: tokens are sent once to each rank, or node, where that saves bytes, as counted on drawn sets."""

from random import Random
from typing import Any

import pytest

from megalina.blocks.dispatch import ONCE_PER_NODE, ONCE_PER_RANK, ROWS, Dispatch, bytes_of_rows, dispatch_of
from megalina.compose import compose
from megalina.config import PretrainConfig


def config_of(*, experts: int, top_k: int, ep: int, width: int = 2048, dispatch: str = "auto") -> PretrainConfig:
    return compose(
        [
            "model=tiny",
            f"model.num_experts={experts}",
            f"router.top_k={top_k}",
            f"parallel.ep={ep}",
            f"model.d_model={width}",
            "train.dtype=bfloat16",
            f"parallel.dispatch={dispatch}",
        ]  # fmt: skip
    )


@pytest.mark.parametrize(("ep", "visited"), [(8, 4.54), (4, 3.35), (2, 1.98)])
def test_the_ranks_that_a_token_visits_are_those_of_drawn_sets(ep: int, visited: float) -> None:
    config, random = config_of(experts=64, top_k=6, ep=ep), Random(0)
    drawn = [len({expert * ep // 64 for expert in random.sample(range(64), 6)}) for _ in range(20_000)]
    weights = 64 // ep * 4 / (2048 * 2)  # beside a row
    found = bytes_of_rows(config, ep) * 6 / (1 + weights)
    assert found == pytest.approx(sum(drawn) / len(drawn), rel=0.01) and found == pytest.approx(visited, abs=0.01)


def kind(*, nodes: int = 0, per_node: int = 0, **how: Any) -> str:
    config = config_of(**how)
    config.cluster.nodes, config.cluster.ranks_per_node = nodes, per_node
    return dispatch_of(config).kind


def test_auto_is_once_where_a_tenth_is_saved() -> None:
    assert kind(experts=64, top_k=6, ep=8) == kind(experts=64, top_k=6, ep=2) == ONCE_PER_RANK
    assert kind(experts=64, top_k=6, ep=64) == ROWS  # an expert a rank: nothing to save
    assert kind(experts=64, top_k=1, ep=8) == ROWS
    assert kind(experts=64, top_k=6, ep=1) == ROWS
    assert kind(experts=64, top_k=6, ep=8, width=32) == ROWS  # weights are as much as rows
    assert kind(experts=64, top_k=6, ep=8, dispatch="rows") == ROWS
    assert kind(experts=64, top_k=1, ep=8, dispatch="once_per_rank") == ONCE_PER_RANK


def test_auto_is_once_per_node_where_that_saves_another_tenth() -> None:
    assert kind(nodes=4, per_node=2, experts=64, top_k=6, ep=8) == ONCE_PER_NODE  # 3.35 rows for 4.54
    assert kind(nodes=8, per_node=1, experts=64, top_k=6, ep=8) == ONCE_PER_RANK  # one rank a node
    assert kind(nodes=1, per_node=8, experts=64, top_k=6, ep=8) == ONCE_PER_RANK  # one node
    assert kind(nodes=4, per_node=2, experts=16, top_k=2, ep=8) == ROWS  # 1.8 and 1.93 rows for 2, with weights more
    assert kind(nodes=4, per_node=2, experts=64, top_k=6, ep=8, dispatch="once_per_node") == ONCE_PER_NODE


def test_packing_may_put_ranks_of_ep_on_one_node() -> None:
    config = config_of(experts=64, top_k=6, ep=8, dispatch="once_per_node")
    config.cluster.nodes, config.cluster.ranks_per_node = 4, 2
    found = [dispatch_of(config, packing) for packing in (1, 2, 4)]
    assert found == [Dispatch(ONCE_PER_NODE, 4), Dispatch(ONCE_PER_NODE, 2), Dispatch(ONCE_PER_RANK)]
