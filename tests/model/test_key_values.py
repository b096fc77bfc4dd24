"""The cache of keys and values: the same bits as putting one behind the other, in room that is taken once."""

import pytest
import torch

from megalina.blocks.heads import tokens_of_room
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


@pytest.mark.parametrize("window", [1, 2, 4, 5, 11, 40])
@pytest.mark.parametrize("capacity", [0, 3, TOKENS])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_window_keeps_what_is_still_seen_and_gives_the_same_bits(window: int, capacity: int, sinks: bool) -> None:
    """A prompt that is longer than the window, tokens one by one, and several at once behind them."""
    cache, full = KeyValues(capacity, window), KeyValues(capacity)
    queries, keys, values = (pieces(torch.float64, heads, seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    document_BL = torch.ones(SEQUENCES, TOKENS, dtype=torch.int64)
    document_BL[1, :7], document_BL[2, :3] = 0, 0
    how = {"window": window, "sink_H": torch.linspace(-1, 1, HEADS, dtype=torch.float64) if sinks else None}
    for q_BSHd, k_BSGd, v_BSGd in zip(queries, keys, values, strict=True):
        before, new = full.length, k_BSGd.shape[1]
        all_k, all_v = full.extended(k_BSGd, v_BSGd)
        k_BLGd, v_BLGd = cache.extended(k_BSGd, v_BSGd)
        assert k_BLGd.shape[1] == v_BLGd.shape[1] == new + min(before, window - 1) and cache.length == full.length
        documents = document_BL[:, : full.length]
        found = attend(q_BSHd, k_BLGd, v_BLGd, documents[:, -k_BLGd.shape[1] :], **how)  # type: ignore[arg-type]
        assert torch.equal(found, attend(q_BSHd, all_k, all_v, documents, **how))  # type: ignore[arg-type]
        assert cache.room <= window - 1 + max(1, window // 4)
    assert capacity < TOKENS or cache.room == tokens_of_room(window, TOKENS)


def test_a_window_moves_seldom_and_leaves_what_was_handed_out() -> None:
    cache, token = KeyValues(1000, 128), torch.ones(1, 1, KV_HEADS, HEAD_DIM)
    cache.extended(token.expand(-1, 500, -1, -1))
    seen = [cache.extended(token * i)[0] for i in range(500)]
    assert [int(x[0, -1, 0, 0]) for x in seen] == [*range(500)] and all(x.shape[1] == 128 for x in seen)
    assert len({x.untyped_storage().data_ptr() for x in seen}) == -(-500 // 32)
    assert cache.room == tokens_of_room(128, 1000) == 159


def test_what_was_handed_out_stays_as_it_was() -> None:
    cache = KeyValues(10)
    first, _ = cache.extended(*(torch.ones(1, 2, KV_HEADS, HEAD_DIM),) * 2)
    cache.extended(*(torch.zeros(1, 3, KV_HEADS, HEAD_DIM),) * 2)
    assert first.shape[1] == 2 and bool((first == 1).all())
