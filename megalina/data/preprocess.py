"""Preprocessing: files of text to indexed datasets, by several processes, with the same bytes whatever their number.

One process reads and cuts (cheap), a pool parses and encodes chunks, and the results are written in the order of the input.
With partitions, each has a reader, a pool and files of its own, which are joined at the end.
"""

import functools
import multiprocessing
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalina.data.documents import Chunk, Source, cut_sources, read_chunks, texts
from megalina.data.indexed import IndexedWriter, Manifest, best_dtype, tokenizer_sha256
from megalina.data.tokenizer import Tokenizer, open_tokenizer

Advance = Callable[[int, int], None]  # bytes of the input on disk, bytes of text


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to each document."""

    tokenizer: str  # as `open_tokenizer` takes it
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False


@dataclass(frozen=True, slots=True)
class Totals:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.documents + other.documents, self.tokens + other.tokens, self.text_bytes + other.text_bytes)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The documents of one chunk under one key; those without a token are left out."""

    tokens: npt.NDArray[Any]  # flat
    lengths: npt.NDArray[np.int32]
    text_bytes: int


def encode_documents(tokenizer: Tokenizer, documents: list[str], *, append_eod: bool) -> Encoded:
    id_lists = [ids for ids in tokenizer.encode_many(documents) if ids]
    if append_eod:
        for ids in id_lists:
            ids.append(tokenizer.eod)
    lengths = np.fromiter(map(len, id_lists), np.int32, len(id_lists))
    tokens = np.empty(int(lengths.sum()), best_dtype(tokenizer.vocab_size))
    at = 0
    for ids in id_lists:
        tokens[at : at + len(ids)] = ids
        at += len(ids)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in documents)
    return Encoded(tokens, lengths, text_bytes)


def output_prefixes(output_prefix: str, json_keys: Sequence[str]) -> list[str]:
    """PREFIX for one key; PREFIX_KEY_document for each of several."""
    return [output_prefix] if len(json_keys) == 1 else [f"{output_prefix}_{key}_document" for key in json_keys]


def preprocess(
    sources: Sequence[Source], output_prefix: str, recipe: Recipe, *, workers: int = 1, partitions: int = 1, advance: Advance
) -> list[Totals]:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json; returns the totals of each key.

    ValueError where a document can't be read, nothing is left, or the numbers of processes make no sense.
    """
    if workers < 1 or partitions < 1 or workers % partitions:
        raise ValueError(f"workers ({workers}) must be a positive multiple of partitions ({partitions})")
    if len(set(recipe.json_keys)) < len(recipe.json_keys):
        raise ValueError(f"a key is named twice in {' '.join(recipe.json_keys)}: name each once")
    tokenizer = open_tokenizer(recipe.tokenizer)
    prefixes = output_prefixes(output_prefix, recipe.json_keys)
    _spare_inputs([*(source.path for source in sources), recipe.tokenizer], prefixes)
    if partitions == 1:
        totals = _write(sources, prefixes, recipe, workers, advance)
    else:
        totals = _write_partitions(cut_sources(sources, partitions), prefixes, recipe, tokenizer, workers // partitions, advance)
    for prefix, total in zip(prefixes, totals, strict=True):
        if total.tokens == 0:
            for suffix in (".bin", ".idx"):
                Path(prefix + suffix).unlink()
            raise ValueError(f"there is no text for {prefix} in {len(sources)} input files: give files with text in them")
        sha256 = tokenizer_sha256(recipe.tokenizer)
        Manifest(recipe.tokenizer, sha256, tokenizer.vocab_size, total.documents, total.tokens).write(prefix)
    return totals


def _spare_inputs(inputs: Iterable[str], prefixes: Iterable[str]) -> None:
    """ValueError where an output would replace an input, as PREFIX.json of corpus.json with the prefix corpus."""
    read = {os.path.realpath(path) for path in inputs}
    for prefix in prefixes:
        for suffix in (".bin", ".idx", ".json", ".bin.partial", ".idx.partial"):
            if os.path.realpath(prefix + suffix) in read:
                raise ValueError(f"the output {prefix}{suffix} would replace an input: choose another output prefix")


def _write(sources: Iterable[Source], prefixes: list[str], recipe: Recipe, workers: int, advance: Advance) -> list[Totals]:
    totals = [Totals() for _ in prefixes]
    dtype = best_dtype(open_tokenizer(recipe.tokenizer).vocab_size)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(prefix, dtype)) for prefix in prefixes]
        chunks = (chunk for source in sources for chunk in read_chunks(source))
        for disk_bytes, columns in _encode_all(chunks, recipe, workers):
            for i, (writer, encoded) in enumerate(zip(writers, columns, strict=True)):
                writer.add_documents(encoded.tokens, encoded.lengths)
                totals[i] += Totals(len(encoded.lengths), len(encoded.tokens), encoded.text_bytes)
            advance(disk_bytes, sum(encoded.text_bytes for encoded in columns))
    return totals


def _encode_all(chunks: Iterator[Chunk], recipe: Recipe, workers: int) -> Iterator[tuple[int, list[Encoded]]]:
    """In the order of the chunks; a few a worker are under way at a time, so memory stays small."""
    if workers == 1:
        for chunk in chunks:
            yield chunk.disk_bytes, _encode_chunk(chunk, recipe)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)
    under_way: deque[tuple[int, Future[list[Encoded]]]] = deque()
    try:
        for chunk in chunks:
            under_way.append((chunk.disk_bytes, pool.submit(_encode_chunk, chunk, recipe)))
            if len(under_way) > 3 * workers:
                disk_bytes, first = under_way.popleft()
                yield disk_bytes, first.result()
        for disk_bytes, future in under_way:
            yield disk_bytes, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_chunk(chunk: Chunk, recipe: Recipe) -> list[Encoded]:
    tokenizer = _tokenizer(recipe.tokenizer, os.stat(recipe.tokenizer).st_mtime_ns if recipe.tokenizer != "bytes" else 0)
    return [encode_documents(tokenizer, column, append_eod=recipe.append_eod) for column in texts(chunk, recipe.json_keys)]


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, changed_ns: int) -> Tokenizer:
    """A worker opens its tokenizer once, not once a chunk."""
    return open_tokenizer(path)


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core


def _write_partitions(
    parts: list[list[Source]], prefixes: list[str], recipe: Recipe, tokenizer: Tokenizer, workers: int, advance: Advance
) -> list[Totals]:
    context = multiprocessing.get_context("spawn")
    names = [[f"{prefix}.partition_{part:03d}" for prefix in prefixes] for part in range(len(parts))]
    try:
        with context.Manager() as manager, ProcessPoolExecutor(len(parts), mp_context=context) as pool:
            reports = manager.Queue()
            futures = [pool.submit(_write_partition, *job, recipe, workers, reports) for job in zip(parts, names, strict=True)]
            while not all(future.done() for future in futures):
                _drain(reports, advance)
                time.sleep(0.1)
            results = [future.result() for future in futures]
            _drain(reports, advance)
        for i, prefix in enumerate(prefixes):
            with IndexedWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer:
                for part, result in zip(names, results, strict=True):
                    if result[i].tokens:
                        writer.add_dataset(part[i])
    finally:
        for part in names:
            for name in part:
                for suffix in (".bin", ".idx"):
                    Path(name + suffix).unlink(missing_ok=True)
    return [sum(column, Totals()) for column in zip(*results, strict=True)]


def _write_partition(sources: list[Source], names: list[str], recipe: Recipe, workers: int, reports: Any) -> list[Totals]:
    return _write(sources, names, recipe, workers, lambda disk_bytes, text_bytes: reports.put((disk_bytes, text_bytes)))


def _drain(reports: Any, advance: Advance) -> None:
    while True:
        try:
            advance(*reports.get_nowait())
        except queue.Empty:
            return
