"""A GPT dataset: documents in shuffled order, packed without gaps into sequences.

Each epoch shuffles the documents, lays them one after another and cuts that text every `seq_len` tokens; then it shuffles the
sequences.  Sequence i of the text is its tokens i x seq_len up to and including (i + 1) x seq_len: the last one is only a label.
All of it is a function of (seed, epoch).  What is left over at the end of an epoch is not used in it.

The index of an epoch is three arrays: the documents' order, where each begins in the text, the sequences' order.  A sequence is
found by bisection, so there is no table of sequences to build.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalina.data.cache import Arrays, cached_arrays
from megalina.data.indexed import IndexedDataset

_DOCUMENTS, _SEQUENCES = 0, 1  # which of an epoch's two shuffles
_ARRAYS = ("order", "begins", "shuffle")
_KEPT_FROM = 1 << 16  # documents and sequences: smaller indices are made in a few ms, faster than a file is opened


@dataclass(frozen=True, slots=True)
class Span:
    """A share of a dataset: documents [first, last), of which those at the edges may be cut at a token."""

    first_document: int
    last_document: int
    first_token: int
    last_token: int

    @property
    def num_tokens(self) -> int:
        return self.last_token - self.first_token


@dataclass(frozen=True, slots=True)
class PackedSequence:
    tokens: npt.NDArray[np.int64]  # [seq_len + 1]
    ends: npt.NDArray[np.bool_]  # [seq_len + 1], True: the last token of its document
    num_tokens: int  # the rest is padding; seq_len + 1 wherever there is enough text


def split_documents(dataset: IndexedDataset, shares: list[float]) -> list[Span | None]:
    """Contiguous ranges of documents in proportion to `shares`; None for a share of zero and for one that no token is left for.

    Every other share gets at least one document.  Are there fewer documents than such shares, the text is cut in tokens instead.
    """
    total = sum(shares)
    fractions = [share / total for share in shares]
    wanted = sum(share > 0 for share in shares)
    if dataset.num_documents < wanted:
        edges = [round(sum(fractions[:i]) * dataset.num_tokens) for i in range(len(shares) + 1)]
        starts = dataset.document_starts(0, dataset.num_documents)
        spans = []
        for first, last in zip(edges, edges[1:], strict=False):
            documents = np.searchsorted(starts, [first, last - 1], side="right") - 1
            spans.append(Span(int(documents[0]), int(documents[1]) + 1, first, last) if last > first else None)
        return spans
    edges = [round(sum(fractions[:i]) * dataset.num_documents) for i in range(len(shares) + 1)]
    counts = [last - first for first, last in zip(edges, edges[1:], strict=False)]
    for i, share in enumerate(shares):
        if share > 0 and counts[i] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    spans, first = [], 0
    for count in counts:
        span = Span(first, first + count, dataset.document_start(first), dataset.document_start(first + count))
        spans.append(span if span.num_tokens else None)
        first += count
    return spans


class GPTDataset:
    """The sequences of one span.

    With `repeat` they go on for ever, in new epochs; epochs too short for one sequence are joined until there is one.  Without,
    there is one epoch, the same every time, that starts again from its beginning; too short, it is one padded sequence.
    """

    def __init__(self, dataset: IndexedDataset, span: Span, *, seq_len: int, seed: int, repeat: bool, cache_dir: Path) -> None:
        self._dataset, self._span = dataset, span
        self._seq_len, self._seed, self._repeat, self._cache_dir = seq_len, seed, repeat, cache_dir
        self._copies = math.ceil((seq_len + 1) / span.num_tokens) if repeat else 1
        self.num_sequences = max(1, (self._copies * span.num_tokens - 1) // seq_len)  # of one epoch
        self._indices: dict[int, Arrays] = {}  # of the last two epochs asked for: a batch may lie across two

    def sequence(self, number: int) -> PackedSequence:
        epoch, within = divmod(number, self.num_sequences)
        index = self._index(epoch if self._repeat else 0)
        order, begins = index["order"], index["begins"]
        size = self._seq_len + 1
        tokens, ends = np.zeros(size, np.int64), np.zeros(size, np.bool_)
        start = int(index["shuffle"][within]) * self._seq_len
        slot = int(np.searchsorted(begins, start, side="right")) - 1
        filled = 0
        while filled < size and slot < len(order):
            document = int(order[slot])
            last = min(self._dataset.document_start(document + 1), self._span.last_token)
            at = max(self._dataset.document_start(document), self._span.first_token) + start + filled - int(begins[slot])
            count = min(last - at, size - filled)
            if count > 0:
                tokens[filled : filled + count] = self._dataset.tokens[at : at + count]
                filled += count
                ends[filled - 1] = at + count == last
            slot += 1
        return PackedSequence(tokens, ends, filled)

    def _index(self, epoch: int) -> Arrays:
        if epoch not in self._indices:
            if len(self._indices) == 2:
                self._indices.pop(next(iter(self._indices)))
            entries = self._copies * (self._span.last_document - self._span.first_document) + self.num_sequences
            keep = entries >= _KEPT_FROM
            folder, build = self._folder(epoch), lambda: self._build(epoch)
            self._indices[epoch] = cached_arrays(folder, _ARRAYS, build) if keep else build()
        return self._indices[epoch]

    def _build(self, epoch: int) -> Arrays:
        first, last = self._span.first_document, self._span.last_document
        starts = np.clip(self._dataset.document_starts(first, last), self._span.first_token, self._span.last_token)
        orders = [_permutation(last - first, self._seed, epoch * self._copies + copy, _DOCUMENTS) for copy in range(self._copies)]
        order = np.concatenate(orders)
        begins = np.zeros(len(order), np.int64)
        np.cumsum(np.diff(starts)[order[:-1]], out=begins[1:])
        order += order.dtype.type(first)
        return {"order": order, "begins": begins, "shuffle": _permutation(self.num_sequences, self._seed, epoch, _SEQUENCES)}

    def _folder(self, epoch: int) -> Path:
        index_file = Path(f"{self._dataset.prefix}.idx").resolve()
        state = index_file.stat()
        facts = (str(index_file), state.st_size, state.st_mtime_ns, self._span, self._seq_len, self._seed, self._copies)
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        return self._cache_dir / f"index-{name}" / f"epoch-{epoch:06d}"


def _permutation(count: int, seed: int, epoch: int, which: int) -> npt.NDArray[Any]:
    # RandomState is old, but the only generator whose stream numpy promises never to change
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch & 0xFFFFFFFF, epoch >> 32, which]
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    np.random.RandomState(words).shuffle(order)
    return order
