"""Statistics of tokens: which ids occur, how often."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalina.data.cache import Arrays, cached_arrays
from megalina.data.gpt_dataset import Span
from megalina.data.indexed import IndexedDataset

_AT_ONCE = 1 << 20  # tokens
_COUNTED_AT_MOST = 1 << 28  # tokens: of larger corpora every k-th part is counted
_KEPT_FROM = 1 << 24  # tokens: smaller corpora are read faster than it is worth a file


def max_id(dataset: IndexedDataset, cache_dir: Path) -> int:
    """The largest id in the whole dataset.  ValueError where one is negative."""
    found = _cached(dataset, "max", "extremes", cache_dir, lambda: _extremes(dataset.tokens))
    if found["extremes"][0] < 0:
        raise ValueError(f"{dataset.prefix}.bin holds the token id {found['extremes'][0]}: ids are not negative; write it again")
    return int(found["extremes"][1])


def frequencies(dataset: IndexedDataset, span: Span, num_ids: int, cache_dir: Path) -> npt.NDArray[np.float64]:
    """Share of each id below `num_ids` among the tokens of the span (of more than 2^28 tokens, among an even sample)."""
    tokens = dataset.tokens[span.first_token : span.last_token]
    found = _cached(dataset, f"counts {span} {num_ids}", "counts", cache_dir, lambda: _counts(tokens, num_ids))
    return np.asarray(found["counts"] / found["counts"].sum())


def entropy(shares: npt.NDArray[np.float64]) -> float:
    """In nats."""
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def _extremes(tokens: npt.NDArray[Any]) -> Arrays:
    parts = [tokens[at : at + _AT_ONCE] for at in range(0, len(tokens), _AT_ONCE)]
    return {"extremes": np.array([min(part.min() for part in parts), max(part.max() for part in parts)], np.int64)}


def _counts(tokens: npt.NDArray[Any], num_ids: int) -> Arrays:
    every = -(-len(tokens) // _COUNTED_AT_MOST)
    counts = np.zeros(num_ids, np.int64)
    for at in range(0, len(tokens), _AT_ONCE * every):
        counts += np.bincount(tokens[at : at + _AT_ONCE], minlength=num_ids)
    return {"counts": counts}


def _cached(dataset: IndexedDataset, what: str, name: str, cache_dir: Path, build: Any) -> Arrays:
    if dataset.num_tokens < _KEPT_FROM:
        arrays: Arrays = build()
        return arrays
    path = Path(f"{dataset.prefix}.bin").resolve()
    facts = (str(path), path.stat().st_size, path.stat().st_mtime_ns, what)
    return cached_arrays(cache_dir / f"statistics-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}", [name], build)
