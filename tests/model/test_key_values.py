"""The cache of keys and values: the same bits as putting one behind the other, in room that is taken once."""

import pytest
import torch

from megalina.model.attend import attend
from megalina.model.attention import KeyValues

SEQUENCES, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 8
PASSES = (5, 1, 1, 3, 1, 1, 1, 7, 1)  # tokens: prefill, then decoding
TOKENS = sum(PASSES)


def pieces(dtype: torch.dtype, heads: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(SEQUENCES, n, heads, HEAD_DIM, generator=random, dtype=torch.float64).to(dtype) for n in PASSES]


@pytest.mark.parametrize("capacity", [0, 3, TOKENS, 2 * TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [False, True])
def test_a_cache_gives_the_bits_of_everything_in_a_row(capacity: int, dtype: torch.dtype, padding: bool) -> None:
    cache = KeyValues(capacity)
    queries, keys, values = (pieces(dtype, heads, seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    document_BL = torch.ones(SEQUENCES, TOKENS, dtype=torch.int64)
    document_BL[1, :2] = 0
    for i, (q_BSHd, k_BSGd, v_BSGd) in enumerate(zip(queries, keys, values, strict=True)):
        k_BLGd, v_BLGd = cache.extended(k_BSGd, v_BSGd)
        whole_k, whole_v = torch.cat(keys[: i + 1], 1), torch.cat(values[: i + 1], 1)
        assert torch.equal(k_BLGd, whole_k) and torch.equal(v_BLGd, whole_v) and cache.length == whole_k.shape[1]
        documents = document_BL[:, : cache.length] if padding else None
        assert torch.equal(attend(q_BSHd, k_BLGd, v_BLGd, documents), attend(q_BSHd, whole_k, whole_v, documents))


def test_room_is_taken_once_where_the_length_is_known_and_seldom_where_it_is_not() -> None:
    token = torch.ones(1, 1, KV_HEADS, HEAD_DIM)
    for capacity, most in ((100, 1), (0, 8)):
        cache = KeyValues(capacity)
        places = [cache.extended(token, token)[0].data_ptr() for _ in range(100)]
        assert len({*places}) <= most


def test_what_was_handed_out_stays_as_it_was() -> None:
    cache = KeyValues(10)
    first, _ = cache.extended(*(torch.ones(1, 2, KV_HEADS, HEAD_DIM),) * 2)
    cache.extended(*(torch.zeros(1, 3, KV_HEADS, HEAD_DIM),) * 2)
    assert first.shape[1] == 2 and bool((first == 1).all())
