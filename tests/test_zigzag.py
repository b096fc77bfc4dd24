"""Zigzag: every token has one rank, what is cut is put together again, and causal work is even."""

from dataclasses import replace

import pytest
import torch

from megalina.batch import Batch
from megalina.zigzag import by_rank, in_order, own_part, pieces_of, places


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_ranks_have_is_put_in_order_again(ranks: int) -> None:
    x_BS = torch.arange(2 * 2 * ranks * 3 * 5).view(2, 2 * ranks * 3, 5)
    parts = [own_part(x_BS, ranks, rank) for rank in range(ranks)]
    gathered = torch.cat([part.flatten(0, 1) for part in parts])
    assert torch.equal(in_order(gathered, ranks, 2), x_BS)
    assert torch.equal(by_rank(x_BS, ranks), gathered)


def test_a_rank_has_as_many_tokens_before_its_own_as_any_other() -> None:
    seen = [int((places(64, 4, rank) + 1).sum()) for rank in range(4)]
    assert len(set(seen)) == 1
    assert pieces_of(4, 0) == (0, 7) and pieces_of(4, 3) == (3, 4)
    assert sorted(int(p) for rank in range(4) for p in places(64, 4, rank)) == list(range(64))


def test_a_part_of_a_batch_knows_its_places_and_the_whole() -> None:
    token_BS = torch.arange(24).view(3, 8)
    batch = replace(Batch.whole(token_BS), position_BS=torch.arange(8).flip(0).expand(3, 8), document_BS=token_BS % 8 // 3)
    parts = [batch.part_of(2, rank) for rank in range(2)]
    assert parts[0].place_S.tolist() == [0, 1, 6, 7] and parts[1].place_S.tolist() == [2, 3, 4, 5]
    for part in parts:
        assert torch.equal(part.tokens_BS, token_BS[:, part.place_S])
        assert torch.equal(part.position_BS, 7 - part.place_S.expand(3, -1))
        assert torch.equal(part.loss_mask_BS, batch.loss_mask_BS[:, part.place_S])
        assert part.uncut is batch and not part.may_have_padding
        second = part.split(1)[1]
        assert torch.equal(second.uncut.tokens_BS, token_BS[1:2]) and torch.equal(second.place_S, part.place_S)
    assert batch.part_of(1, 0) is batch
