"""Digests see every change of tokens and routing, and know nothing of who holds what."""

from dataclasses import replace

import torch

from megalina.model.digest import routing_digest, tokens_digest
from megalina.model.permute import row_order
from tests.train.small_run import random_batch

MASK = torch.tensor([0xFFFFFFFF, 0xFFFFFFFF])


def test_the_digest_of_a_batch_is_the_sum_over_any_cut_of_it() -> None:
    batch = random_batch(8)
    for size in (1, 2, 4):
        assert torch.equal(sum(map(tokens_digest, batch.split(size))) & MASK, tokens_digest(batch) & MASK)  # type: ignore[operator]


def test_the_digest_of_a_batch_sees_one_token_one_label_one_mask_and_the_order() -> None:
    batch = random_batch(4)
    seen = {tuple(tokens_digest(batch).tolist())}
    for name in ("tokens_BS", "labels_BS"):
        changed = getattr(batch, name).clone()
        changed[2, 3] += 1
        seen.add(tuple(tokens_digest(replace(batch, **{name: changed})).tolist()))
    masked = batch.loss_mask_BS.clone()
    masked[0, 0] = False
    seen.add(tuple(tokens_digest(replace(batch, loss_mask_BS=masked)).tolist()))
    swapped = batch.tokens_BS.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    seen.add(tuple(tokens_digest(replace(batch, tokens_BS=swapped)).tolist()))
    seen.add(tuple(tokens_digest(replace(batch, sample_B=batch.sample_B + 1)).tolist()))
    assert len(seen) == 6


def test_the_digest_of_a_routing_is_the_sum_over_slices_of_tokens_and_sees_each_choice() -> None:
    expert_TK = torch.randint(0, 5, (24, 2), generator=torch.Generator().manual_seed(0))  # 4 experts; 4 is nobody
    sample_T, position_T = torch.arange(24) // 6, torch.arange(24) % 6
    whole = routing_digest(row_order(expert_TK, 4), sample_T, position_T)
    cut = [slice(0, 7), slice(7, 24)]
    parts = [routing_digest(row_order(expert_TK[s], 4), sample_T[s], position_T[s]) for s in cut]
    assert torch.equal(sum(parts) & MASK, whole & MASK)  # type: ignore[operator]
    seen = {tuple(whole.tolist())}
    for t in range(24):
        for k in range(2):
            other = expert_TK.clone()
            other[t, k] = (other[t, k] + 1) % 5
            seen.add(tuple(routing_digest(row_order(other, 4), sample_T, position_T).tolist()))
    assert len(seen) == 49
    swapped = expert_TK.flip(1)
    assert not torch.equal(routing_digest(row_order(swapped, 4), sample_T, position_T), whole)
