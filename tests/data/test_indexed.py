"""Indexed datasets: the format, to the byte, and what is said about files that aren't of it."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megalina.data.indexed import IndexedDataset, IndexedWriter, best_dtype

DOCUMENTS = [[[5, 6, 7]], [[8], [9, 10]], [[11, 12, 13, 14]]]  # documents of sequences of ids


def write(prefix: Path, dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add_document([i for sequence in document for i in sequence], [len(sequence) for sequence in document])
    return prefix


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    write(tmp_path / "a")
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 4)
    expected += struct.pack("<4i", 3, 1, 2, 4) + struct.pack("<4q", 0, 6, 8, 12) + struct.pack("<4q", 0, 1, 3, 4)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<10H", *range(5, 15))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_what_is_written_is_read(tmp_path: Path, dtype: type) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", dtype))
    assert dataset.dtype == dtype and dataset.num_documents == 3 and dataset.num_tokens == 10
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    assert [dataset.document(i).tolist() for i in range(3)] == [[5, 6, 7], [8, 9, 10], [11, 12, 13, 14]]
    assert dataset.document_starts(1, 3).tolist() == [3, 6, 10]


def test_adding_many_documents_or_a_dataset_is_adding_each(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "each", np.int32) as writer:
        for document in ([1, 2], [3], [4, 5, 6], [7]):
            writer.add_document(document)
    with IndexedWriter(tmp_path / "tail", np.int32) as writer:
        writer.add_documents(np.array([4, 5, 6, 7]), np.array([3, 1]))
    with IndexedWriter(tmp_path / "joined", np.int32) as writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([2, 1]))
        writer.add_dataset(tmp_path / "tail")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"each{suffix}").read_bytes() == (tmp_path / f"joined{suffix}").read_bytes()


def test_tokens_are_mapped_not_loaded(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a"))
    assert all(isinstance(array, np.memmap) for array in (dataset.tokens, dataset.lengths, dataset.pointers))


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def change(path: Path, at: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    path.write_bytes(raw)


DAMAGES = {
    "a.idx does not exist": lambda folder: (folder / "a.idx").unlink(),
    "a.bin does not exist": lambda folder: (folder / "a.bin").unlink(),
    "a.idx is empty": lambda folder: (folder / "a.idx").write_bytes(b""),
    "a.idx is not a Megatron index": lambda folder: (folder / "a.idx").write_bytes(
        b"PK\x03\x04 something else, long enough for a header"
    ),
    "a.idx is truncated: 20 bytes": lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes()[:20]),
    "a.idx is truncated: 100 bytes": lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes()[:100]),
    "a.idx is damaged: 115 bytes": lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes() + b"x"),
    "a.bin has 19 bytes where .* it is truncated": lambda folder: (folder / "a.bin").write_bytes(b"x" * 19),
    "a.bin has 0 bytes where .* it is truncated": lambda folder: (folder / "a.bin").write_bytes(b""),
    "a.bin has 22 bytes where .* of another dataset": lambda folder: (folder / "a.bin").write_bytes(b"x" * 22),
    "version 2 and type code 8": lambda folder: change(folder / "a.idx", 9, struct.pack("<Q", 2)),
    "version 1 and type code 9": lambda folder: change(folder / "a.idx", 17, b"\x09"),
    "tokens are float32": lambda folder: change(folder / "a.idx", 17, b"\x07"),
    "don't lie one after another": lambda folder: change(folder / "a.idx", 34 + 16, struct.pack("<q", 2)),
    "a sequence of -3 tokens": lambda folder: change(folder / "a.idx", 34, struct.pack("<i", -3)),
    "document boundaries don't go from 0 to 4": lambda folder: change(folder / "a.idx", 34 + 48, struct.pack("<q", 1)),
    "has sequence modes": lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes() + bytes(4)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_or_foreign_file_is_named_in_one_line(tmp_path: Path, message: str) -> None:
    write(tmp_path / "a")
    DAMAGES[message](tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        IndexedDataset(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_missing_prefix_is_answered_with_those_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    with pytest.raises(ValueError, match="has the prefixes mine"):
        IndexedDataset(tmp_path / "mine_text_document")


def test_a_dataset_without_tokens_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16):
        pass
    with pytest.raises(ValueError, match="holds no tokens"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron.*")
def test_megatron_reads_what_is_written_here_and_writes_the_same_bytes(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    for vocab_size in (4096, 65499, 65500, 200000):
        assert megatron.DType.optimal_dtype(vocab_size) == best_dtype(vocab_size)
    for dtype in (np.uint16, np.int32, np.int64):
        ours = write(tmp_path / f"ours_{np.dtype(dtype)}", dtype)
        theirs = tmp_path / f"theirs_{np.dtype(dtype)}"
        builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for document in DOCUMENTS:
            ids = torch.tensor([i for sequence in document for i in sequence])
            builder.add_document(ids, [len(sequence) for sequence in document])
        builder.finalize(f"{theirs}.idx")
        for suffix in (".bin", ".idx"):
            assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
        read = megatron.IndexedDataset(str(ours))
        mine = IndexedDataset(theirs)
        assert [read[i].tolist() for i in range(len(read))] == [mine[i].tolist() for i in range(len(mine))]
        assert read.document_indices.tolist() == mine.document_indices.tolist()
