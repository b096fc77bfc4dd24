"""The largest logit of each group of heads, in blocks of queries, against all logits at once."""

import pytest
import torch

from megalina.model.attend import attention_mask
from megalina.model.largest_logits import largest_logits


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 64, 65, 150])
@pytest.mark.parametrize("documents", [False, True])
def test_blocks_find_the_largest_logit_that_a_query_sees(length: int, groups: int, documents: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    q_BSHd = torch.randn(3, length, 4, 8, generator=generator, dtype=torch.float64)
    k_BSGd = torch.randn(3, length, groups, 8, generator=generator, dtype=torch.float64)
    document_BS = torch.rand(3, length, generator=generator).lt(0.1).long().cumsum(1) if documents else None
    logit_BHSL = torch.einsum("bshd,blhd->bhsl", q_BSHd, k_BSGd.repeat_interleave(4 // groups, 2)) / 8**0.5
    seen = attention_mask(length, length, document_BS, q_BSHd.device)
    want_H = logit_BHSL.where(seen, float("-inf")).amax(dim=(0, 2, 3))
    got_G = largest_logits(q_BSHd, k_BSGd, document_BS)
    torch.testing.assert_close(got_G, want_H.view(groups, -1).amax(1), rtol=1e-13, atol=0)


def test_a_rank_without_sequences_has_none() -> None:
    assert largest_logits(torch.empty(0, 5, 2, 4), torch.empty(0, 5, 1, 4)).tolist() == [float("-inf")]


def test_a_window_hides_what_is_further_back() -> None:
    torch.manual_seed(1)
    q_BSHd, k_BSGd = torch.randn(2, 150, 4, 6, dtype=torch.float64), torch.randn(2, 150, 2, 6, dtype=torch.float64)
    place_S = torch.arange(150)
    back_SS = place_S[:, None] - place_S[None, :]
    logit_BHSS = torch.einsum("bshd,blhd->bhsl", q_BSHd, k_BSGd.repeat_interleave(2, 2)) / 6**0.5
    for window in (1, 5, 64, 149):
        want_H = logit_BHSS.where((back_SS >= 0) & (back_SS < window), float("-inf")).amax(dim=(0, 2, 3))
        torch.testing.assert_close(largest_logits(q_BSHd, k_BSGd, window=window), want_H.view(2, 2).amax(1))
