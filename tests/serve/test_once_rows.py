"""Rows that travel to a device once: what arrives is what arrives without packing, row for row."""

import numpy as np
import pytest
import torch

from megalina.model.permute import permute, row_order
from megalina.placement.chosen_slots import rows_once
from megalina.serve.once_rows import pack, unpack

RANKS, SLOTS, TOKENS, WIDTH = 3, 5, 11, 6


def choices(seed: int, top_k: int) -> torch.Tensor:
    """Slots of all ranks' tokens; some are nobody's, and some a token has twice."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, RANKS * SLOTS + 2, (RANKS, TOKENS, top_k))).clamp(max=RANKS * SLOTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 4])
def test_unpacked_rows_are_those_that_come_without_packing(dtype: torch.dtype, top_k: int) -> None:
    slot_RTK, x_RTD = choices(top_k, top_k), torch.randn(RANKS, TOKENS, WIDTH).to(dtype)
    orders = [row_order(slot_TK, RANKS * SLOTS) for slot_TK in slot_RTK]
    packed = [pack(x_TD, order, SLOTS) for x_TD, order in zip(x_RTD, orders, strict=True)]
    for rank in range(RANKS):
        parts, expected, sizes = [], [], []
        for source, (packed_UC, way) in enumerate(packed):
            begin = int(way.count_E[:rank].sum())
            sizes.append(int(way.count_E[rank]))
            parts.append(packed_UC[begin : begin + sizes[-1]])
            rows_QD = permute(x_RTD[source], orders[source]).split(orders[source].count_E.tolist())
            expected += rows_QD[rank * SLOTS : (rank + 1) * SLOTS]
        assert torch.equal(unpack(torch.cat(parts), sizes, SLOTS, WIDTH), torch.cat(expected))


def test_a_token_has_one_row_for_a_device_whatever_it_chose_there() -> None:
    for slot_TK in choices(0, 4):
        way = pack(torch.zeros(TOKENS, WIDTH), row_order(slot_TK, RANKS * SLOTS), SLOTS)[1]
        expected = [sum(bool((row // SLOTS == rank).any()) for row in slot_TK) for rank in range(RANKS)]
        assert way.count_E.tolist() == rows_once(slot_TK.numpy(), RANKS, SLOTS).tolist() == expected


def test_without_a_token_nothing_is_packed() -> None:
    order = row_order(torch.full((TOKENS, 2), RANKS * SLOTS), RANKS * SLOTS)
    packed_UC, way = pack(torch.zeros(TOKENS, WIDTH), order, SLOTS)
    assert len(packed_UC) == 0 and way.count_E.tolist() == [0] * RANKS
    assert unpack(packed_UC, [0] * RANKS, SLOTS, WIDTH).shape == (0, WIDTH)
