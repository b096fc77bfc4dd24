"""A chunk of documents, as it comes from a file: .txt, folders, .jsonl (each also compressed by gzip or zstd) and .parquet.

Reading is cheap (bytes are cut, nothing is parsed), so that one process feeds many: `texts` does the work, anywhere.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by a file's first bytes; no text in UTF-8 begins so
_NOT_READ = {b"BZh": "by bzip2", b"\xfd7zXZ": "by xz", b"PK\x03\x04": "in a zip archive"}
_CHUNK_BYTES = 1 << 20
_MAX_DOCUMENTS = 4096  # a chunk: keeps the tokens of very short documents together
_MAX_LINE_BYTES = 1 << 28  # a few kB of a compressed file can be a line that no memory holds
_MAX_TEXT_BYTES = (1 << 31) - (1 << 16)  # an indexed dataset counts the tokens of a sequence in 31 bits


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
        if _is_lines(source) and not _compression(source.path):
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
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{_place(chunk, i)} is not JSON that can be read ({error}): {raw[:60]!r}") from error
        for key, column in zip(keys, found, strict=True):
            value = record.get(key) if isinstance(record, dict) else None
            if not isinstance(value, str):
                names = ", ".join(ascii(name)[1:-1][:40] for name in list(record)[:8]) if isinstance(record, dict) else ""
                has = f"has keys {names}" if isinstance(record, dict) else f"is a {type(record).__name__}"
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
    name = source.path.removesuffix(".gz").removesuffix(".zst")
    return name.endswith(".jsonl") or (name.endswith(".json") and source.required)  # in a folder a .json may be anything: text


def _compression(path: str) -> str:
    """What the file is compressed by, or "".  Its first bytes count; its name does where they are damaged."""
    with open(path, "rb") as file:
        first = file.read(64)
    for magic, name in _COMPRESSED.items():
        if first.startswith(magic):
            return name
    if not first or (len(first) >= 4 and _begins_text(first)):
        return ""
    return "gzip" if path.endswith(".gz") else "zstd" if path.endswith(".zst") else ""


def _read_text(source: Source) -> Iterator[Chunk]:
    raw = _unpacked(source) if _compression(source.path) else _plain(source)
    if raw is None:
        return
    if source.required:
        if raw[257:262] == b"ustar":
            raise ValueError(f"{source.path} is a tar archive: unpack it, and give the folder")
        _decoded(raw, source.path)
    elif b"\0" in raw[:8192] or not _is_utf8(raw):
        return
    yield Chunk(source, False, 1, [raw], source.stop - source.start)


def _plain(source: Source) -> bytes | None:
    """The file; None: too large, and no text that was asked for."""
    num_bytes = Path(source.path).stat().st_size
    if num_bytes > _MAX_TEXT_BYTES:
        if not source.required and _is_binary(source.path):
            return None
        raise ValueError(
            f"{source.path} has {num_bytes} bytes, and one document at most {_MAX_TEXT_BYTES}: cut it, or make it JSON lines"
        )
    return Path(source.path).read_bytes()


def _unpacked(source: Source) -> bytes | None:
    """A compressed file, in pieces: a few kB of it can be more than memory holds; None: no text, and none that was asked for."""
    pieces: list[bytes] = []
    size = 0
    with open(source.path, "rb") as file:
        stream = _decompressed(file, source.path)
        try:
            while piece := stream.read(_CHUNK_BYTES):
                if not pieces and not source.required and b"\0" in piece[:8192]:
                    return None
                pieces.append(piece)
                size += len(piece)
                if size > _MAX_TEXT_BYTES:
                    raise ValueError(
                        f"{source.path} has more than {_MAX_TEXT_BYTES} bytes once it is unpacked, and one document no more: "
                        "cut it, or make it JSON lines"
                    )
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{source.path} can't be decompressed after byte {size}: {error}") from error
    return b"".join(pieces)


def _read_lines(source: Source) -> Iterator[Chunk]:
    with open(source.path, "rb") as file:
        stream = _decompressed(file, source.path)
        if source.start > 0:  # a line belongs to the part that it begins in
            file.seek(source.start - 1)
            _skip_line(file)
        begin, first_line = file.tell(), 1
        lines: list[bytes] = []
        size = 0
        at = begin  # in the file as it is on disk
        before = begin
        compressed = stream is not file
        try:
            while compressed or at < source.stop:
                line = stream.readline(_MAX_LINE_BYTES + 1)
                if not line:
                    break
                if len(line) > _MAX_LINE_BYTES:
                    place = _place(Chunk(source, True, first_line, [], 0), len(lines))
                    raise ValueError(f"{place} has more than {_MAX_LINE_BYTES} bytes: cut that document")
                lines.append(line)
                size += len(line)
                at = file.tell() if compressed else at + len(line)
                if size >= _CHUNK_BYTES or len(lines) == _MAX_DOCUMENTS:
                    yield Chunk(source, True, first_line, lines, at - before)
                    first_line, lines, size, before = first_line + len(lines), [], 0, at
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{source.path} can't be decompressed after line {first_line + len(lines) - 1}: {error}") from error
        if lines:
            yield Chunk(source, True, first_line, lines, at - before)


def _begins_text(first: bytes) -> bool:
    """Whether these bytes, of which the last character may be cut, are UTF-8 without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(first)
    except UnicodeDecodeError:
        return False
    return all(character >= " " or character in "\t\n\r" for character in text)


def _decompressed(file: IO[bytes], path: str) -> IO[bytes]:
    compression = _compression(path)
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)
    if compression == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path} needs the package zstandard: pip install zstandard") from error
        return io.BufferedReader(_Zstandard(file, zstandard.ZstdDecompressor(), zstandard.ZstdError), 1 << 20)
    return file


class _Zstandard(io.RawIOBase):
    """A file of zstd frames as a raw stream.

    The package's own stream takes a file that was cut off for one that ends there.  Its error type becomes OSError, like gzip's.
    """

    _PIECE_BYTES = 4096  # becomes at most 128 MiB, whatever the file claims

    def __init__(self, file: IO[bytes], decompressor: Any, error_type: type[Exception]) -> None:
        self._file, self._decompressor, self._error_type = file, decompressor, error_type
        self._frame: Any = None  # None: between frames
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            piece = self._file.read(self._PIECE_BYTES)
            if not piece:
                if self._frame is not None:
                    raise OSError("the file ended before the end of its zstd frame")
                return 0
            self._ready = memoryview(self._decompressed(piece))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, piece: bytes) -> bytes:
        data = []
        try:
            while piece:
                if self._frame is None:
                    self._frame = self._decompressor.decompressobj(write_size=1 << 15)
                data.append(self._frame.decompress(piece))
                piece = b""
                if self._frame.eof:
                    piece, self._frame = self._frame.unused_data, None
        except self._error_type as error:
            raise OSError(str(error)) from error
        return data[0] if len(data) == 1 else b"".join(data)


def _read_parquet(source: Source) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{source.path} needs the package pyarrow: pip install pyarrow") from error
    done = 0
    try:
        file = pyarrow.parquet.ParquetFile(source.path)
        columns = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.large_string())]
        rows = max(1, file.metadata.num_rows)
        for table in file.iter_batches(batch_size=256, columns=columns):
            raws = [json.dumps(row).encode() for row in table.to_pylist()]
            before = (source.stop - source.start) * done // rows
            yield Chunk(source, True, done + 1, raws, (source.stop - source.start) * (done + len(raws)) // rows - before)
            done += len(raws)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # of the package, OSError is most of them
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source.path} is not a readable parquet file, after row {done}: {said}") from error


def _skip_line(file: IO[bytes]) -> None:
    """In pieces: a line may be longer than the memory."""
    while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass


def _is_binary(path: str) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def _decoded(raw: bytes, path: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        for magic, how in _NOT_READ.items():
            if raw.startswith(magic):
                raise ValueError(f"{path} is compressed {how}, which is not read: unpack it, or use gzip or zstd") from error
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
            _skip_line(file)
            begin = file.tell()
            file.seek(0)
            while file.tell() < begin:
                number += file.read(min(1 << 24, begin - file.tell())).count(b"\n")
    return f"{chunk.source.path}, {'row' if chunk.source.path.endswith('.parquet') else 'line'} {number}"
