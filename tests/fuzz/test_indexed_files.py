""".bin/.idx files with any bytes: they open and every document can be read, or a ValueError names the file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megalina.config import DataConfig
from megalina.data.indexed import IndexedDataset, IndexedWriter
from megalina.data.source import open_data
from tests.fuzz.bounded import outcomes, spoiled

HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("boundaries", "<u8")])
NUMBERS = st.one_of(st.integers(0, 6), st.sampled_from([2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]))
SIGNED = st.one_of(st.integers(-3, 5), st.sampled_from([2**62, -(2**62), 2**63 - 1, -(2**63)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indexed")


def index_of(sequences: int, lengths: list[int], pointers: list[int], boundaries: list[int], *, code: int = 8) -> bytes:
    header = np.array([(b"MMIDIDX\0\0", 1, code, sequences, len(boundaries))], HEADER).tobytes()
    return (
        header + np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(boundaries, "<i8").tobytes()
    )


def read_all(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    documents = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert sum(map(len, documents)) == dataset.num_tokens
    for i in range(len(dataset)):
        dataset[i].tolist()
    return documents


def opens_or_is_named(folder: Path, index: bytes, tokens: bytes) -> None:
    (folder / "a.idx").write_bytes(index)
    (folder / "a.bin").write_bytes(tokens)
    try:
        read_all(folder / "a")
    except ValueError as error:
        assert str(folder / "a.") in str(error)
        assert "\n" not in str(error)


@given(st.integers(0, 9), NUMBERS, NUMBERS, st.binary(max_size=60), st.binary(max_size=12))
def test_any_header_is_compared_with_the_size_of_its_file(
    folder: Path, code: int, sequences: int, boundaries: int, rest: bytes, tokens: bytes
) -> None:
    header = np.array([(b"MMIDIDX\0\0", 1, code, sequences, boundaries)], HEADER).tobytes()
    opens_or_is_named(folder, header + rest, tokens)


@given(st.lists(st.integers(-2, 4), max_size=4), st.lists(SIGNED, max_size=6), st.data())
def test_lengths_pointers_and_boundaries_may_be_anything(
    folder: Path, lengths: list[int], boundaries: list[int], data: st.DataObject
) -> None:
    right = (np.cumsum([0, *lengths])[:-1] * 2).tolist()
    pointers = data.draw(st.one_of(st.just(right), st.lists(SIGNED, min_size=len(lengths), max_size=len(lengths))))
    ends = data.draw(st.sampled_from([[0, *boundaries, len(lengths)], boundaries]))
    opens_or_is_named(folder, index_of(len(lengths), lengths, pointers, ends), bytes(2 * max(0, sum(lengths))))


def test_boundaries_whose_differences_wrap_around_are_refused(folder: Path) -> None:
    quarter = 2**62
    boundaries = [0, quarter, 2**63 - 1, -(2**63) + quarter - 2, -5, 1]
    with np.errstate(over="ignore"):
        assert (np.diff(np.array(boundaries)) >= 0).all()  # as a careless check would have it
    (folder / "w.idx").write_bytes(index_of(1, [2], [0], boundaries))
    (folder / "w.bin").write_bytes(b"abcd")
    with pytest.raises(ValueError, match="w.idx is damaged: its 6 document boundaries don't go from 0 to 1"):
        IndexedDataset(folder / "w")


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.integers(0, 40), st.integers(0, 5))
@example([], 0, 0)
def test_a_spoiled_pair_of_files_is_refused_or_whole(folder: Path, edits: list[tuple[int, int]], cut: int, cut_bin: int) -> None:
    with IndexedWriter(folder / "good", np.uint16) as writer:
        for count in (3, 1, 7):
            writer.add_document(list(range(count)))
    index, tokens = (folder / "good.idx").read_bytes(), (folder / "good.bin").read_bytes()
    if not edits and not cut and not cut_bin:
        assert read_all(folder / "good") == [[0, 1, 2], [0], [0, 1, 2, 3, 4, 5, 6]]
    opens_or_is_named(folder, spoiled(index, edits, cut), tokens[: len(tokens) - cut_bin])


def test_a_small_file_that_claims_2_to_the_60_documents_takes_no_memory(tmp_path: Path) -> None:
    for name, sequences, boundaries in (("s", 2**60, 2), ("d", 1, 2**60), ("b", 2**64 - 1, 2**64 - 1), ("m", 2**31, 2**31)):
        header = np.array([(b"MMIDIDX\0\0", 1, 8, sequences, boundaries)], HEADER).tobytes()
        (tmp_path / f"{name}.idx").write_bytes(header + bytes(66))
        (tmp_path / f"{name}.bin").write_bytes(bytes(4))
    code = """
from megalina.data.indexed import IndexedDataset
limit(64)
for name in "sdbm":
    attempt(name, lambda: IndexedDataset(sys.argv[1] + "/" + name))
"""
    for name, (kind, message) in outcomes(code, str(tmp_path)).items():
        assert kind == "ValueError" and f"{name}.idx is truncated: 100 bytes" in message


def test_an_id_that_no_vocabulary_has_is_refused_before_tables_of_that_size(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int64) as writer:
        writer.add_document([1, 2, 2**40])
    data = DataConfig(kind="indexed", prefix=str(tmp_path / "a"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"a\.bin holds the token id 1099511627776, at most 16777216 ids are possible"):
        open_data(data, seq_len=4, seed=0)
