"""An indexed dataset: token ids in PREFIX.bin and where each sequence and document lies in PREFIX.idx.

The format is Megatron's, byte for byte.  All numbers are little-endian:

    PREFIX.idx   "MMIDIDX" 0 0 | u64 version = 1 | u8 dtype code | u64 sequences N | u64 boundaries D
                 | i32 length[N] in tokens | i64 pointer[N] in bytes
                 | i64 document[D]: the sequence that each document begins at, then N
    PREFIX.bin   the tokens of all sequences, one after another

Both are memory-mapped: opening reads a few pages, whatever the size.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, get_type_hints

import numpy as np
import numpy.typing as npt

from megalina.whole_file import naming

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CHECKED_AT_ONCE = 1 << 22  # sequences: bounds the memory of the check

Array = npt.NDArray[Any]
_MAX_BYTES = 1 << 16  # a larger file of that name is something else, such as the corpus itself


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type for ids below `vocab_size`, chosen as Megatron chooses it."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """Reads PREFIX.bin and PREFIX.idx.

    `tokens` (flat, all tokens), `lengths`, `pointers` and `document_indices` are arrays mapped from the files.
    ValueError names a file that is missing, empty, truncated or not of this format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise ValueError(f"{path} does not exist: {_suggestion(Path(prefix))}")
        self.dtype, num_sequences, num_boundaries = _read_header(idx_path)
        lengths_at = _HEADER.size
        pointers_at = lengths_at + 4 * num_sequences
        documents_at = pointers_at + 8 * num_sequences
        self.lengths = _mapped(idx_path, np.dtype("<i4"), lengths_at, num_sequences)
        self.pointers = _mapped(idx_path, np.dtype("<i8"), pointers_at, num_sequences)
        self.document_indices = _mapped(idx_path, np.dtype("<i8"), documents_at, num_boundaries)
        bin_bytes = bin_path.stat().st_size
        self.num_tokens = self._check(idx_path, bin_path, bin_bytes)
        self.tokens = _mapped(bin_path, self.dtype, 0, self.num_tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        """The number of sequences; a document has one or more."""
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> Array:
        start = int(self.pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[sequence])]

    def document_start(self, document: int) -> int:
        """Where this document begins in `tokens`; for `num_documents`, where the last one ends."""
        sequence = int(self.document_indices[document])
        return self.num_tokens if sequence == len(self) else int(self.pointers[sequence]) // self.dtype.itemsize

    def document_starts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Where documents first .. last - 1 begin, and where the last of them ends: last - first + 1 numbers."""
        ends = self.document_start(last)
        sequences = np.asarray(self.document_indices[first:last])
        full = sequences < len(self)  # documents without a sequence may stand at the very end
        starts = np.full(last - first + 1, ends, dtype=np.int64)
        starts[:-1][full] = self.pointers[sequences[full]] // self.dtype.itemsize
        return starts

    def document(self, document: int) -> Array:
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]

    def _check(self, idx_path: Path, bin_path: Path, bin_bytes: int) -> int:
        """What a damaged or foreign file would get wrong; returns the number of tokens."""
        expected, itemsize = 0, self.dtype.itemsize
        for first in range(0, len(self), _CHECKED_AT_ONCE):
            lengths = self.lengths[first : first + _CHECKED_AT_ONCE].astype(np.int64)
            pointers = self.pointers[first : first + _CHECKED_AT_ONCE]
            if lengths.min() < 0:
                raise ValueError(f"{idx_path} is damaged: a sequence of {int(lengths.min())} tokens; write it again")
            ends = expected + np.cumsum(lengths) * itemsize
            if not np.array_equal(pointers, ends - lengths * itemsize):
                raise ValueError(f"{idx_path} is damaged: its sequences don't lie one after another; write it again")
            expected = int(ends[-1])
            if expected > bin_bytes:
                break  # what follows can only be more, in the end more than 64 bits hold
        if expected == 0:
            raise ValueError(f"{idx_path} holds no tokens ({len(self)} sequences): give a corpus with text in it")
        if bin_bytes != expected:
            word = "truncated" if bin_bytes < expected else "of another dataset"
            raise ValueError(
                f"{bin_path} has {bin_bytes} bytes where {idx_path} needs {expected}: it is {word}; write both again"
            )
        boundaries = self.document_indices
        ends_right = len(boundaries) >= 2 and boundaries[0] == 0 and boundaries[-1] == len(self)
        if not ends_right or not _is_sorted(boundaries):
            raise ValueError(
                f"{idx_path} is damaged: its {len(boundaries)} document boundaries don't go from 0 to {len(self)}; write it again"
            )
        return expected // itemsize


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; they appear when `finalize` has succeeded, never half written.

    As a context manager it finalizes at the end, and removes what it wrote if the block raises.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        self._code = next(code for code, known in _DTYPES.items() if np.dtype(known) == self.dtype)
        self._bin_path, self._idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._partial, self._idx_partial = Path(f"{prefix}.bin.partial"), Path(f"{prefix}.idx.partial")
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._bin: IO[bytes] = self._partial.open("wb")
        except OSError as error:
            raise ValueError(f"{self._partial} can't be written ({error.strerror}): choose another output prefix") from error
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._documents: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._num_sequences = 0

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finalize()
        else:
            try:
                self._bin.close()  # on a full disk it raises once more
            finally:
                self._remove_partial()

    def add_document(self, tokens: Iterable[int] | Array, lengths: Sequence[int] | None = None) -> None:
        """One document; `lengths` cuts it into sequences (one by default)."""
        ids = np.asarray(tokens, dtype=self.dtype)
        parts = np.asarray([len(ids)] if lengths is None else lengths, dtype=np.int32)
        assert int(parts.sum()) == len(ids)
        with naming(self._bin_path):
            self._bin.write(ids.tobytes())
        self._append(parts, np.array([len(parts)], np.int64))

    def add_documents(self, tokens: Array, lengths: Array) -> None:
        """Many documents of one sequence each: `tokens` is flat, `lengths` says where it is cut."""
        with naming(self._bin_path):
            self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._append(np.asarray(lengths, dtype=np.int32), np.arange(1, len(lengths) + 1, dtype=np.int64))

    def add_dataset(self, prefix: str | Path) -> None:
        """Everything that another dataset of the same type holds."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise ValueError(f"{prefix}.bin holds {other.dtype}, {self.prefix}.bin {self.dtype}: use one tokenizer for both")
        with naming(self._bin_path):
            for first in range(0, other.num_tokens, 1 << 24):
                self._bin.write(other.tokens[first : first + (1 << 24)].tobytes())
        self._append(np.array(other.lengths), np.array(other.document_indices[1:]))

    def finalize(self) -> None:
        try:
            self._finalize()
        except OSError:
            self._remove_partial()
            raise

    def _finalize(self) -> None:
        with naming(self._bin_path):
            self._bin.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1] * np.int64(self.dtype.itemsize), out=pointers[1:])
        documents = np.concatenate(self._documents)
        partial = self._idx_partial
        with naming(self._idx_path), partial.open("wb") as out:
            out.write(_HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(documents)))
            for array in (lengths.astype("<i4"), pointers.astype("<i8"), documents.astype("<i8")):
                out.write(array.data)  # array.tofile would lose the reason of an error
        self._idx_path.unlink(missing_ok=True)  # an older index must not stand beside the new tokens, not even for a moment
        self._partial.replace(self._bin_path)
        partial.replace(self._idx_path)

    def _remove_partial(self) -> None:
        for path in (self._partial, self._idx_partial):
            path.unlink(missing_ok=True)

    def _append(self, lengths: npt.NDArray[np.int32], document_ends: npt.NDArray[np.int64]) -> None:
        self._lengths.append(lengths)
        self._documents.append(document_ends + self._num_sequences)
        self._num_sequences += len(lengths)


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: write it again with tools/preprocess_data.py")
    if not header.startswith(_MAGIC):
        raise ValueError(f"{path} is not a Megatron index (it begins with {header[:9]!r}): use tools/preprocess_data.py")
    if len(header) < _HEADER.size:
        raise ValueError(f"{path} is truncated: {size} bytes, a header alone has {_HEADER.size}; write it again")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"{path} has version {version} and type code {code}; known are version 1 and codes 1 to 8")
    dtype = np.dtype(_DTYPES[code])
    if dtype.kind == "f":
        raise ValueError(f"{path} says that its tokens are {dtype}: token ids are integers")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size == expected + num_sequences > expected:
        raise ValueError(f"{path} has sequence modes, as multimodal datasets do: give a dataset of text alone")
    if size != expected:
        word = "truncated" if size < expected else "damaged"
        raise ValueError(f"{path} is {word}: {size} bytes where {num_sequences} sequences need {expected}; write it again")
    return dtype, num_sequences, num_boundaries


def _is_sorted(numbers: Array) -> bool:
    """Without differences: those of 64-bit numbers wrap around."""
    starts = range(0, len(numbers) - 1, _CHECKED_AT_ONCE)
    pieces = (numbers[first : first + _CHECKED_AT_ONCE + 1] for first in starts)
    return not any(np.any(piece[1:] < piece[:-1]) for piece in pieces)


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Array:
    if count == 0:
        return np.zeros(0, dtype)  # nothing can't be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _suggestion(prefix: Path) -> str:
    nearby = sorted(path.stem for path in prefix.parent.glob("*.idx")) if prefix.parent.is_dir() else []
    if nearby:
        return f"{prefix.parent} has the prefixes {', '.join(nearby[:5])}"
    return "give the prefix of a .bin and .idx pair, as tools/preprocess_data.py writes it"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Which tokenizer made an indexed dataset, in PREFIX.json beside it: the format itself has no place for that."""

    tokenizer: str  # its path when the dataset was made
    tokenizer_sha256: str
    vocab_size: int
    documents: int
    tokens: int

    def write(self, prefix: str | Path) -> None:
        path = Path(f"{prefix}.json")
        with naming(path):
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """None where there is none, as for datasets that other programs made."""
    path = Path(f"{prefix}.json")
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        return None  # a file of that name that something else wrote
    kinds = get_type_hints(Manifest).items()
    return manifest if all(type(getattr(manifest, name)) is kind for name, kind in kinds) else None


def tokenizer_sha256(path: str) -> str:
    return hashlib.sha256(b"bytes" if path == "bytes" else Path(path).read_bytes()).hexdigest()
