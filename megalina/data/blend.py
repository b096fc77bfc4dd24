"""A blend: which of several corpora each sample comes from, so that every prefix of the order has the weights asked for.

Error diffusion, in Megatron's order: sample n comes from the corpus that lags furthest behind weight x n, the first of equals.
"""

import hashlib
from pathlib import Path

import numpy as np

from megalina.data.cache import Arrays, cached_arrays

_BLOCK = 1 << 16  # samples; the counts at each block's begin are kept, so that no order starts from the very first sample again
_ARRAYS = ("corpus", "within_corpus", "counts_after")


class Blend:
    """`weights` are positive; only their proportions matter."""

    def __init__(self, weights: list[float], *, cache_dir: Path) -> None:
        total = sum(weights)
        self._weights = [weight / total for weight in weights]
        self._folder = cache_dir / f"blend-{hashlib.sha256(repr(self._weights).encode()).hexdigest()[:16]}"
        self._number, self._block = -1, Arrays()

    def pick(self, sample: int) -> tuple[int, int]:
        """(corpus, how many samples before this one came from the same corpus)."""
        if len(self._weights) == 1:
            return 0, sample
        number, within = divmod(sample, _BLOCK)
        if number != self._number:
            self._number, self._block = number, self._load(number)
        return int(self._block["corpus"][within]), int(self._block["within_corpus"][within])

    def _load(self, number: int) -> Arrays:
        known = number
        while known > 0 and not self._entry(known).is_dir():
            known -= 1
        block = cached_arrays(self._entry(known), _ARRAYS, lambda: _block(self._weights, 0, [0] * len(self._weights)))
        for following in range(known + 1, number + 1):
            counts = block["counts_after"].tolist()
            first = following * _BLOCK
            block = cached_arrays(self._entry(following), _ARRAYS, lambda: _block(self._weights, first, counts))  # noqa: B023
        return block

    def _entry(self, number: int) -> Path:
        return self._folder / f"block-{number:06d}"


def _block(weights: list[float], first: int, counts: list[int]) -> Arrays:
    corpus = np.empty(_BLOCK, np.uint16)
    within_corpus = np.empty(_BLOCK, np.int64)
    counts = list(counts)
    for i in range(_BLOCK):
        samples = float(max(first + i, 1))
        errors = [weight * samples - count for weight, count in zip(weights, counts, strict=True)]
        chosen = errors.index(max(errors))
        corpus[i], within_corpus[i] = chosen, counts[chosen]
        counts[chosen] += 1
    return {"corpus": corpus, "within_corpus": within_corpus, "counts_after": np.array(counts, np.int64)}
