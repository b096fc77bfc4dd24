"""Rows through experts: with tiles, what becomes of a row depends on the row alone."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalina.blocks.activation import Activation
from megalina.model.experts import expert_mlp
from megalina.model.rows import expert_rows
from megalina.serve.engine import TILE_ROWS

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SWIGLU = Activation("swiglu")
WIDTHS = [(32, 24), (64, 128), (130, 70), (512, 32), (96, 1024)]  # model, hidden


def weights_of(width: int, hidden: int, activation: Activation, bias: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(width * hidden)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    inner = activation.inputs * hidden
    found = {"w1": draw(inner, width), "w2": draw(width, hidden)}
    return found | ({"b1": draw(inner), "b2": draw(width)} if bias else {})


@pytest.mark.sampled(16)
def test_a_row_is_the_same_wherever_it_is(subtests: pytest.Subtests) -> None:
    for sizes, name, dtype in product(WIDTHS, ("swiglu", "swiglu_clamped", "gelu"), DTYPES):
        with subtests.test(sizes=sizes, activation=name, dtype=dtype):
            is_the_same(*sizes, Activation(name), dtype)


def is_the_same(width: int, hidden: int, activation: Activation, dtype: torch.dtype) -> None:
    weights = weights_of(width, hidden, activation, activation.name == "gelu", dtype)
    x_ND = torch.randn(70, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    alone = torch.cat([expert_rows(x_ND[i : i + 1], [1], [weights], activation=activation, tile=TILE_ROWS) for i in range(70)])
    for rows in (70, 64, 17, 16, 3):
        for begin in range(0, 70 - rows + 1, 5):
            some = expert_rows(x_ND[begin : begin + rows], [rows], [weights], activation=activation, tile=TILE_ROWS)
            assert torch.equal(some, alone[begin : begin + rows])


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), tile=st.sampled_from([0, 3, 16]), bias=st.booleans())
def test_it_is_the_mlp_of_training(counts: list[int], tile: int, bias: bool) -> None:
    weights = [weights_of(32, 24 + 0 * i, SWIGLU, bias, torch.float64) for i in range(len(counts))]
    stacked = {name: torch.stack([w[name] * (i + 1) for i, w in enumerate(weights)]) for name in weights[0]}
    own = [{name: t[i] for name, t in stacked.items()} if n else None for i, n in enumerate(counts)]
    x_ND = torch.randn(sum(counts), 32, dtype=torch.float64)
    expected = expert_mlp(x_ND, counts, stacked["w1"], stacked["w2"], stacked.get("b1"), stacked.get("b2"), activation=SWIGLU)
    found = expert_rows(x_ND, counts, own, activation=SWIGLU, tile=tile)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
