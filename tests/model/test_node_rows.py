"""Rows that a rank passes on in its node: each goes to the ranks that have experts of it, and what they give is summed."""

import pytest
import torch
from torch import Tensor

from megalina.model.node_rows import NodeRow, NodeWay
from megalina.model.weight_columns import NOT_CHOSEN, columns_of, weights_of

WIDTH, RANKS, HERE = 4, 3, 2  # experts of a rank


def arrived(dtype: torch.dtype, weight_dtype: torch.dtype, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their tokens and their weights; one of them is for nobody here."""
    random = torch.Generator().manual_seed(0)
    token_AD = torch.randn(rows, WIDTH, generator=random, dtype=torch.float64).to(dtype)
    weight_Ae = torch.rand(rows, RANKS * HERE, generator=random, dtype=torch.float64).to(weight_dtype)
    weight_Ae[torch.rand(rows, RANKS * HERE, generator=random) < 0.6] = NOT_CHOSEN
    weight_Ae[3:4] = NOT_CHOSEN
    return torch.cat([token_AD, columns_of(weight_Ae, dtype)], 1), token_AD, weight_Ae


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("rows", [7, 0])
def test_rows_go_where_their_experts_are_and_their_sums_come_back(dtypes: tuple[torch.dtype, torch.dtype], rows: int) -> None:
    way = NodeWay(NodeRow(WIDTH, RANKS, dtypes[1]))
    arrived_AC, token_AD, weight_Ae = arrived(*dtypes, rows)
    sent_VC = way.spread(arrived_AC)
    want = [
        (rank, a)
        for rank in range(RANKS)
        for a in range(rows)
        if (weight_Ae[a, rank * HERE : (rank + 1) * HERE] != NOT_CHOSEN).any()
    ]
    assert way.send_P == [sum(rank == r for r, _ in want) for rank in range(RANKS)] and len(sent_VC) == len(want)
    for row_C, (rank, a) in zip(sent_VC, want, strict=True):
        torch.testing.assert_close(row_C[:WIDTH], token_AD[a], rtol=0, atol=0)
        weights = weights_of(row_C[None, WIDTH:], dtypes[1])[0]
        torch.testing.assert_close(weights, weight_Ae[a, rank * HERE : (rank + 1) * HERE], rtol=0, atol=0)

    back_VD = torch.arange(len(want) * WIDTH, dtype=torch.float32).view(-1, WIDTH).to(dtypes[0]) / 8
    sums = [back_VD[[v for v, (_, at) in enumerate(want) if at == a]].double().sum(0) for a in range(rows)]
    sum_AD = torch.stack(sums) if sums else torch.empty(0, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(
        way.gathered(back_VD).double(), sum_AD, rtol=1e-2 if dtypes[0] == torch.bfloat16 else 1e-15, atol=0
    )

    # gradients: of a token's row those of its copies, of a weight its own
    gradient_Ve = torch.arange(len(want) * HERE, dtype=dtypes[1]).view(-1, HERE) + 1
    found_AC = way.gathered(torch.cat([back_VD, columns_of(gradient_Ve, dtypes[0])], 1))
    found_AP = weights_of(found_AC[:, WIDTH:], dtypes[1]).view(rows, RANKS, HERE)
    want_AP = torch.zeros(rows, RANKS, HERE, dtype=dtypes[1])
    for v, (rank, a) in enumerate(want):
        want_AP[a, rank] = gradient_Ve[v]
    torch.testing.assert_close(found_AP, want_AP, rtol=0, atol=0)


def test_what_goes_out_again_takes_the_same_way() -> None:
    """As gradients of what was combined do: without weights."""
    way = NodeWay(NodeRow(WIDTH, RANKS, torch.float64))
    arrived_AC, token_AD, _ = arrived(torch.float64, torch.float64)
    sent_VC, before = way.spread(arrived_AC), way.send_P
    again_VD = way.spread(token_AD)
    torch.testing.assert_close(again_VD, sent_VC[:, :WIDTH], rtol=0, atol=0)
    assert way.send_P is before
