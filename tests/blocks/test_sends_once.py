"""parallel.dispatch=auto: a token is sent once to each rank where that saves bytes, as counted on drawn sets of experts."""

from random import Random

import pytest

from megalina.blocks.model import bytes_once_of_rows, sends_once
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
    found = bytes_once_of_rows(config) * 6 / (1 + weights)
    assert found == pytest.approx(sum(drawn) / len(drawn), rel=0.01) and found == pytest.approx(visited, abs=0.01)


def test_auto_is_once_where_a_tenth_is_saved() -> None:
    assert sends_once(config_of(experts=64, top_k=6, ep=8)) and sends_once(config_of(experts=64, top_k=6, ep=2))
    assert not sends_once(config_of(experts=64, top_k=6, ep=64))  # an expert a rank: nothing to save
    assert not sends_once(config_of(experts=64, top_k=1, ep=8))
    assert not sends_once(config_of(experts=64, top_k=6, ep=1))
    assert not sends_once(config_of(experts=64, top_k=6, ep=8, width=32))  # weights are as much as rows
    assert not sends_once(config_of(experts=64, top_k=6, ep=8, dispatch="rows"))
    assert sends_once(config_of(experts=64, top_k=1, ep=8, dispatch="once_per_rank"))
