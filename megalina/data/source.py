"""The source of batches: what `conf/data` describes, opened.

The order of samples is a function of the seed and a sample's number alone: no matter how many ranks read, which sequences each of
them takes, or where a run was interrupted.
"""

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megalina.batch import Batch
from megalina.config import DataConfig
from megalina.data import corpus
from megalina.data.blend import Blend
from megalina.data.gpt_dataset import GPTDataset, Span, split_documents
from megalina.data.held_out import HeldOutText
from megalina.data.indexed import IndexedDataset, read_manifest, tokenizer_sha256
from megalina.data.statistics import entropy, frequencies, max_id
from megalina.data.tokenizer import MAX_VOCABULARY, Tokenizer, open_tokenizer

_VALIDATION_SEED = 0  # runs of any seed are validated on the same sequences


class Samples(Protocol):
    @property
    def num_sequences(self) -> int:
        """How many there are before the first one comes again."""

    def batch(self, first: int, count: int, stride: int = 1) -> Batch:
        """Sequences first, first + stride, ..., `count` of them."""


@dataclass(frozen=True, slots=True)
class TokenData:
    train: Samples
    valid: Samples | None  # None: the split leaves no text for validation
    held_out: HeldOutText | None  # the same documents, read; None: there are none, or no tokenizer
    tokenizer: Tokenizer | None
    vocab_size: int  # of the tokenizer; without one, the largest id in the data + 1
    tokenizer_path: str  # the file it comes from; empty without one
    unigram_loss: float  # nats: entropy of the training tokens, the loss of the best model that knows no context
    description: str  # a line for the log


class PackedSamples:
    """Sequences of several datasets, blended, as batches.  Several threads may ask."""

    def __init__(
        self,
        datasets: list[GPTDataset],
        weights: list[float],
        *,
        seq_len: int,
        eod: int | None,
        reset_positions: bool,
        reset_attention: bool,
        mask_eod: bool,
        cache_dir: Path,
    ) -> None:
        self._datasets, self._blend, self._seq_len, self._eod = datasets, Blend(weights, cache_dir=cache_dir), seq_len, eod
        self._reset_positions, self._reset_attention, self._mask_eod = reset_positions, reset_attention, mask_eod
        shares = [weight / sum(weights) for weight in weights]
        self.num_sequences = max(1, min(int(d.num_sequences / share) for d, share in zip(datasets, shares, strict=True)))
        self._lock = threading.Lock()  # datasets and blend keep the index that was asked for last

    def batch(self, first: int, count: int, stride: int = 1) -> Batch:
        seq_len = self._seq_len
        tokens = np.empty((count, seq_len + 1), np.int64)
        ends = np.empty((count, seq_len + 1), np.bool_)
        num_labels = np.empty((count, 1), np.int64)
        with self._lock:
            for i in range(count):
                which, number = self._blend.pick(first + stride * i)
                sequence = self._datasets[which].sequence(number)
                tokens[i], ends[i], num_labels[i] = sequence.tokens, sequence.ends, sequence.num_tokens - 1
        valid = np.arange(seq_len) < num_labels
        if self._eod is not None:
            ends |= tokens == self._eod  # files may hold several documents that their index doesn't know of
        ends = ends[:, :-1] & valid
        begins = np.zeros_like(ends)
        begins[:, 1:] = ends[:, :-1]
        position = np.broadcast_to(np.arange(seq_len), (count, seq_len))
        if self._reset_positions:
            position = position - np.maximum.accumulate(np.where(begins, position, 0), axis=1)
        document = torch.from_numpy(np.cumsum(begins, axis=1)) if self._reset_attention and begins.any() else None
        return Batch(
            tokens_BS=torch.from_numpy(tokens[:, :-1].copy()),
            labels_BS=torch.from_numpy(tokens[:, 1:].copy()),
            loss_mask_BS=torch.from_numpy(valid & ~ends if self._mask_eod else valid.copy()),
            valid_BS=torch.from_numpy(valid),
            position_BS=torch.from_numpy(position.copy()),
            document_BS=document,
            sample_B=torch.arange(first, first + stride * count, stride),
        )


def open_data(data: DataConfig, *, seq_len: int, seed: int) -> TokenData:
    """Prepares what is missing in `data.cache_dir`, once, whatever the number of processes that ask.

    ValueError says in one line what is wrong with the configuration or the files.
    """
    if seq_len < 1 or seed < 0:
        raise ValueError(f"the sequence length ({seq_len}) must be positive and the seed ({seed}) not negative")
    cache_dir = Path(data.cache_dir).resolve()
    weights, names = _parts(data)
    shares = _shares(data.split)
    prefixes, tokenizer_path = _prefixes(names, data, cache_dir)
    tokenizer = open_tokenizer(tokenizer_path) if tokenizer_path else None
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    largest = [max_id(dataset, cache_dir) for dataset in datasets]
    if tokenizer is not None:
        for dataset, largest_id in zip(datasets, largest, strict=True):
            _check_vocabulary(dataset, largest_id, tokenizer, tokenizer_path)
    for dataset, largest_id in zip(datasets, largest, strict=True):
        if largest_id >= MAX_VOCABULARY:  # tables of that size follow
            raise ValueError(
                f"{dataset.prefix}.bin holds the token id {largest_id}, at most {MAX_VOCABULARY} ids are possible: write it again"
            )
    vocab_size = tokenizer.vocab_size if tokenizer else max(largest) + 1
    splits = [split_documents(dataset, shares) for dataset in datasets]

    def texts(part: int) -> list[tuple[IndexedDataset, Span, float]]:
        split = ((dataset, spans[part], weight) for dataset, spans, weight in zip(datasets, splits, weights, strict=True))
        return [
            (d, span, weight) for d, span, weight in split if span is not None and span.num_tokens >= 2
        ]  # one token has no next

    def samples(part: int, part_seed: int, repeat: bool) -> PackedSamples:
        return PackedSamples(
            [
                GPTDataset(dataset, span, seq_len=seq_len, seed=part_seed + i, repeat=repeat, cache_dir=cache_dir)
                for i, (dataset, span, _) in enumerate(texts(part))
            ],
            [weight for _, _, weight in texts(part)],
            seq_len=seq_len,
            eod=tokenizer.eod if tokenizer else None,
            reset_positions=data.reset_positions,
            reset_attention=data.reset_attention,
            mask_eod=data.mask_eod,
            cache_dir=cache_dir,
        )

    training = texts(0)
    if not training:
        total = sum(dataset.num_tokens for dataset in datasets)
        raise ValueError(f"data.split={data.split} of {total} tokens leaves fewer than 2 for training: give more text")
    total_weight = sum(weight for _, _, weight in training)
    unigram = np.zeros(vocab_size)
    for dataset, span, weight in training:
        unigram += weight / total_weight * frequencies(dataset, span, vocab_size, cache_dir)
    return TokenData(
        train=samples(0, seed, True),
        valid=samples(1, _VALIDATION_SEED, False) if texts(1) else None,
        held_out=HeldOutText([text[:2] for text in texts(1)], tokenizer) if texts(1) and tokenizer else None,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        tokenizer_path=tokenizer_path,
        unigram_loss=entropy(unigram),
        description=_describe(names, datasets, weights, tokenizer_path, vocab_size),
    )


def _parts(data: DataConfig) -> tuple[list[float], list[str]]:
    """Weights and names: "stdlib", "prose" or the prefix of an indexed dataset."""
    if data.kind not in (*corpus.NAMES, "indexed"):
        raise ValueError(f"data.kind must be stdlib, prose or indexed, not {data.kind!r}")
    if not data.blend:
        if data.kind == "indexed" and not data.prefix:
            raise ValueError("data=indexed needs data.prefix=PREFIX of PREFIX.bin and PREFIX.idx, or data.blend")
        return [1.0], [data.prefix if data.kind == "indexed" else data.kind]
    if data.prefix:
        raise ValueError(f"data.prefix={data.prefix} and data.blend exclude each other: name the prefix in the blend")
    shown = "[" + ", ".join(map(str, data.blend)) + "]"
    form = f"data.blend={shown} must hold a weight and a corpus in turn, like [0.7, stdlib, 0.3, prose]"
    if len(data.blend) % 2:
        raise ValueError(form)
    names = [str(name) for name in data.blend[1::2]]
    try:
        weights = [float(weight) for weight in data.blend[::2]]
    except ValueError as error:
        raise ValueError(f"{form}: {error}") from error
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) == 0:
        raise ValueError(f"data.blend={shown}: weights must be finite, not negative and not all zero")
    kept = [(weight, name) for weight, name in zip(weights, names, strict=True) if weight > 0]
    return [weight for weight, _ in kept], [name for _, name in kept]


def _shares(split: str) -> list[float]:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or any(not math.isfinite(share) or share < 0 for share in shares) or not shares[0] > 0:
        raise ValueError(
            f"data.split={split!r} must be shares for training, validation and test, the first positive, like 969,30,1"
        )
    return shares + [0.0] * (3 - len(shares))


def _prefixes(names: list[str], data: DataConfig, cache_dir: Path) -> tuple[list[str], str]:
    """Where each corpus lies, and the tokenizer of them all ("" if there is none)."""
    prefixes, tokenizer_path = [], data.tokenizer
    for name in names:
        if name not in corpus.NAMES:
            prefixes.append(name)
            continue
        prepared = corpus.open_corpus(name, vocab_size=data.vocab_size, cache_dir=cache_dir)
        if data.tokenizer and tokenizer_sha256(data.tokenizer) != tokenizer_sha256(prepared.tokenizer_path):
            raise ValueError(f"data.tokenizer={data.tokenizer} is not the tokenizer of {name}: leave it out")
        prefixes.append(prepared.prefix)
        tokenizer_path = prepared.tokenizer_path
    return prefixes, tokenizer_path


def _check_vocabulary(dataset: IndexedDataset, largest_id: int, tokenizer: Tokenizer, tokenizer_path: str) -> None:
    manifest = read_manifest(dataset.prefix)
    current = manifest is not None and manifest.tokens == dataset.num_tokens  # not left over from an earlier dataset of this name
    if manifest is not None and current and manifest.tokenizer_sha256 != tokenizer_sha256(tokenizer_path):
        raise ValueError(
            f"{dataset.prefix}.bin was made with {manifest.tokenizer} ({manifest.vocab_size} ids), not with {tokenizer_path} "
            f"({tokenizer.vocab_size} ids): give that tokenizer, or preprocess the text again"
        )
    if largest_id >= tokenizer.vocab_size:
        raise ValueError(
            f"{dataset.prefix}.bin holds the token id {largest_id}, but {tokenizer_path} has only {tokenizer.vocab_size} ids: "
            "give the tokenizer that the data was made with"
        )


def _describe(
    names: list[str], datasets: list[IndexedDataset], weights: list[float], tokenizer_path: str, vocab_size: int
) -> str:
    total = sum(weights)
    parts = [
        (f"{weight / total:.0%} " if len(names) > 1 else "")
        + f"{name}: {dataset.num_documents} documents, {dataset.num_tokens / 1e6:.2f} M tokens, "
        + f"{dataset.num_tokens * dataset.dtype.itemsize / 1e6:.1f} MB"
        for name, dataset, weight in zip(names, datasets, weights, strict=True)
    ]
    tokenizer = f"tokenizer {tokenizer_path}" if tokenizer_path else "no tokenizer"
    return f"{'; '.join(parts)}; {tokenizer}, {vocab_size} ids"
