"""Rows that go back in chunks of slots: all ranks know the sizes, and join them in the order in which they left."""

from itertools import product

import numpy as np
import pytest
import torch

from megalina.model.dispatcher import by_expert, by_source
from megalina.serve.slot_counts import SlotCounts


def test_each_slot_is_in_one_chunk_and_no_chunk_is_empty() -> None:
    for slots in range(1, 9):
        counts = SlotCounts(torch.zeros(2 * slots, dtype=torch.int64), torch.zeros(2, slots, dtype=torch.int64))
        for n in range(1, slots + 1):
            chunks = [list(counts.slots_of((c, n))) for c in range(n)]
            assert sum(chunks, []) == list(range(slots)) and all(chunks)
            assert all(slot * n // slots == c for c, chunk in enumerate(chunks) for slot in chunk)


def test_rows_come_back_in_the_order_in_which_they_left(subtests: pytest.Subtests) -> None:
    for ranks, seed in product((1, 2, 3), range(10)):
        with subtests.test(ranks=ranks, seed=seed):
            rows_come_back(ranks, seed)


def rows_come_back(ranks: int, seed: int) -> None:
    """The exchanges of all ranks, played in one process; a row is (source rank, its number there, its slot)."""
    random = np.random.default_rng(seed)
    slots = int(random.integers(1, 6))
    count_RQ = random.integers(0, 4, (ranks, ranks * slots)) * (random.random((ranks, ranks * slots)) < 0.6)
    count_RQ[random.integers(ranks)] = 0  # a rank without a row
    sent = torch.from_numpy(count_RQ)
    all_counts = [SlotCounts(sent[r], sent[:, r * slots : (r + 1) * slots]) for r in range(ranks)]
    left = []
    for r in range(ranks):
        slot_n = np.repeat(np.arange(ranks * slots), count_RQ[r])
        left.append(torch.from_numpy(np.stack([np.full(len(slot_n), r), np.arange(len(slot_n)), slot_n], 1)))
    got = _all_to_all(left, [c.sizes((0, 1)).splits(outward=True)[0] for c in all_counts])
    for n in range(1, slots + 1):
        came: list[list[torch.Tensor]] = []
        for c in range(n):
            back = []
            for r, counts in enumerate(all_counts):
                sizes = counts.sizes((c, n))
                rows = by_expert(got[r], sizes)
                expected = np.repeat([r * slots + s for s in counts.slots_of((c, n))], sizes.count_e)
                assert rows[:, 2].tolist() == expected.tolist()  # each slot gets its own rows, and all of them
                back.append(by_source(rows, sizes))
            came.append(_all_to_all(back, [counts.sizes((c, n)).splits(outward=False)[0] for counts in all_counts]))
            for r, counts in enumerate(all_counts):  # what is expected is what comes
                assert sum(counts.sizes((c, n)).splits(outward=False)[1]) == len(came[c][r])
        for r, counts in enumerate(all_counts):
            joined = torch.cat([came[c][r] for c in range(n)])[counts.join_index(n)[0]]
            assert torch.equal(joined, left[r])


def _all_to_all(rows: list[torch.Tensor], send: list[list[int]]) -> list[torch.Tensor]:
    parts = [r.split(sizes) for r, sizes in zip(rows, send, strict=True)]
    return [torch.cat([of_rank[to] for of_rank in parts]) for to in range(len(rows))]
