"""A chunk of documents, as it comes from a file: .txt, folders, .jsonl (also .gz, .zst) and .parquet.

Reading is cheap (bytes are cut, nothing is parsed), so that one process feeds many: `texts` does the work, anywhere.
"""

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
_CHUNK_BYTES = 1 << 20
_MAX_DOCUMENTS = 4096  # a chunk: keeps the tokens of very short documents together


@dataclass(frozen=True, slots=True)
class Source:
    """What one reader reads: a file, or those lines of it that begin in bytes [start, stop)."""

    path: str
    start: int
    stop: int
    required: bool  # False: found in a folder, left out if it isn't text


@dataclass(frozen=True, slots=True)
class Chunk:
    source: Source
    lines: bool  # one JSON object each, else one whole file
    first_line: int  # of the chunk, counted from the start of the source
    raws: list[bytes]
    disk_bytes: int  # how far it takes the reader through the source


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Files and folders (all text files in them, hidden ones left out, by name) in the order given.

    ValueError where one doesn't exist or nothing is left.
    """
    sources = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file() and not any(part[0] == "." for part in p.relative_to(path).parts))
            sources += [Source(str(p), 0, p.stat().st_size, required=False) for p in sorted(inside)]
        elif path.is_file():
            sources.append(Source(name, 0, path.stat().st_size, required=True))
        else:
            raise ValueError(f"the input {name} does not exist: give files or folders")
    if not sources:
        raise ValueError(f"there is no file in {', '.join(inputs)}: give a folder with text, .jsonl or .parquet files")
    return sources


def cut_sources(sources: Sequence[Source], parts: int) -> list[list[Source]]:
    """`parts` lists of about as many bytes each, in order; plain files of lines are cut within, others are not."""
    total = sum(source.stop - source.start for source in sources)
    cut: list[list[Source]] = [[] for _ in range(parts)]
    done = 0  # bytes before this source
    for source in sources:
        size = source.stop - source.start
        if _is_lines(source) and not source.path.endswith((".gz", ".zst")):
            edges = [min(max(total * part // parts - done, 0), size) for part in range(parts)] + [size]
            for part in range(parts):
                if edges[part] < edges[part + 1]:
                    start, stop = source.start + edges[part], source.start + edges[part + 1]
                    cut[part].append(Source(source.path, start, stop, source.required))
        else:
            cut[min(parts - 1, (done + size // 2) * parts // max(total, 1))].append(source)
        done += size
    return cut


def read_chunks(source: Source) -> Iterator[Chunk]:
    """The documents of a source, in order."""
    if source.path.endswith(".parquet"):
        yield from _read_parquet(source)
    elif _is_lines(source):
        yield from _read_lines(source)
    else:
        yield from _read_text(source)


def texts(chunk: Chunk, keys: Sequence[str]) -> list[list[str]]:
    """For each key the texts of the chunk's documents.  ValueError names file and line of what isn't such a document."""
    if not chunk.lines:
        if len(keys) > 1:
            raise ValueError(f"{chunk.source.path} is plain text and has no keys {', '.join(keys)}: give one key, or JSON lines")
        return [[_decoded(chunk.raws[0], chunk.source.path)]]
    found: list[list[str]] = [[] for _ in keys]
    for i, raw in enumerate(chunk.raws):
        if raw.isspace() or not raw:
            continue
        try:
            record = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"{_place(chunk, i)} is not JSON ({error}): {raw[:60]!r}") from error
        for key, column in zip(keys, found, strict=True):
            value = record.get(key) if isinstance(record, dict) else None
            if not isinstance(value, str):
                has = f"has keys {', '.join(list(record)[:8])}" if isinstance(record, dict) else f"is a {type(record).__name__}"
                raise ValueError(f"{_place(chunk, i)} has no text under {key!r} (it {has}): set --json-keys")
            column.append(value if value.isascii() else value.encode("utf-8", "replace").decode())  # a lone surrogate becomes "?"
    return found


def read_texts(sources: Sequence[Source], keys: Sequence[str]) -> Iterator[str]:
    """The texts under all keys, one after another."""
    for source in sources:
        for chunk in read_chunks(source):
            for column in texts(chunk, keys):
                yield from column


def _is_lines(source: Source) -> bool:
    name = source.path
    if name.endswith((".json", ".json.gz", ".json.zst")):  # in a folder a .json may be anything: text
        return source.required
    return name.endswith(_RECORDS) and not name.endswith(".parquet")


def _read_text(source: Source) -> Iterator[Chunk]:
    raw = Path(source.path).read_bytes()
    if source.required:
        _decoded(raw, source.path)
    elif b"\0" in raw[:8192] or not _is_utf8(raw):
        return
    yield Chunk(source, False, 1, [raw], len(raw))


def _read_lines(source: Source) -> Iterator[Chunk]:
    with open(source.path, "rb") as file:
        stream = _decompressed(file, source.path)
        if source.start > 0:  # a line belongs to the part that it begins in
            file.seek(source.start - 1)
            file.readline()
        begin, first_line = file.tell(), 1
        lines: list[bytes] = []
        size = 0
        at = begin  # in the file as it is on disk
        before = begin
        compressed = stream is not file
        try:
            while compressed or at < source.stop:
                line = stream.readline()
                if not line:
                    break
                lines.append(line)
                size += len(line)
                at = file.tell() if compressed else at + len(line)
                if size >= _CHUNK_BYTES or len(lines) == _MAX_DOCUMENTS:
                    yield Chunk(source, True, first_line, lines, at - before)
                    first_line, lines, size, before = first_line + len(lines), [], 0, at
        except (OSError, EOFError) as error:
            raise ValueError(f"{source.path} can't be decompressed after line {first_line + len(lines) - 1}: {error}") from error
        if lines:
            yield Chunk(source, True, first_line, lines, at - before)


def _decompressed(file: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)
    if path.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path} needs the package zstandard: pip install zstandard") from error
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return io.BufferedReader(_Zstandard(reader, zstandard.ZstdError), 1 << 20)
    return file


class _Zstandard(io.RawIOBase):
    """The package's reader as a raw stream, its own error type turned into OSError like gzip's."""

    def __init__(self, reader: IO[bytes], error_type: type[Exception]) -> None:
        self._reader, self._error_type = reader, error_type

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            data = self._reader.read(len(buffer))
        except self._error_type as error:
            raise OSError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)


def _read_parquet(source: Source) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{source.path} needs the package pyarrow: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(source.path)
        columns = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.large_string())]
        rows, done = max(1, file.metadata.num_rows), 0
        for table in file.iter_batches(batch_size=256, columns=columns):
            raws = [json.dumps(row).encode() for row in table.to_pylist()]
            before = (source.stop - source.start) * done // rows
            yield Chunk(source, True, done + 1, raws, (source.stop - source.start) * (done + len(raws)) // rows - before)
            done += len(raws)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source.path} is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _decoded(raw: bytes, path: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv") from error


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _place(chunk: Chunk, index: int) -> str:
    number = chunk.first_line + index
    if chunk.source.start > 0:  # only now, for the message, is it worth counting the lines of other parts
        with open(chunk.source.path, "rb") as file:
            file.seek(chunk.source.start - 1)
            file.readline()
            begin = file.tell()
            file.seek(0)
            while file.tell() < begin:
                number += file.read(min(1 << 24, begin - file.tell())).count(b"\n")
    return f"{chunk.source.path}, {'row' if chunk.source.path.endswith('.parquet') else 'line'} {number}"
