"""Preprocessing: the same bytes from every kind of file and any number of processes."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.cli.data import main as preprocess_main
from megalina.data import documents as documents_module
from megalina.data.bpe import train_bpe
from megalina.data.documents import Source, cut_sources, find_sources, read_texts
from megalina.data.indexed import IndexedDataset, read_manifest
from megalina.data.preprocess import Recipe, preprocess
from megalina.data.tokenizer import open_tokenizer
from tests.commands import done
from tools.train_tokenizer import main as train_tokenizer_main

REPOSITORY = Path(__file__).parents[2]
TEXTS = [f"document {i}\n" + "some words, é中🙂 and \u2581 more\n" * (i % 17) for i in range(200)] + ["", "the last one"]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "title": text[:11]}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in.jsonl of `TEXTS`, tok.model, and expected.bin, .idx made from them by one process."""
    folder = tmp_path_factory.mktemp("preprocess")
    (folder / "in.jsonl").write_bytes(lines(TEXTS))
    train_bpe(TEXTS, vocab_size=400, path=folder / "tok.model")
    run(folder, ["in.jsonl"], "expected")
    return folder


def run(
    folder: Path, inputs: list[str], output: str, *, workers: int = 1, partitions: int = 1, **recipe: object
) -> list[tuple[int, int]]:
    reports: list[tuple[int, int]] = []
    preprocess(
        find_sources([str(folder / name) for name in inputs]),
        str(folder / output),
        Recipe(str(folder / "tok.model"), **{"append_eod": True, **recipe}),  # type: ignore[arg-type]
        workers=workers,
        partitions=partitions,
        advance=lambda disk_bytes, text_bytes: reports.append((disk_bytes, text_bytes)),
    )
    return reports


def assert_equal_files(folder: Path, output: str, expected: str = "expected") -> None:
    for suffix in (".bin", ".idx"):
        assert (folder / f"{output}{suffix}").read_bytes() == (folder / f"{expected}{suffix}").read_bytes()


def test_documents_are_encoded_in_order_and_end_with_eod(folder: Path) -> None:
    tokenizer = open_tokenizer(str(folder / "tok.model"))
    dataset = IndexedDataset(folder / "expected")
    kept = [text for text in TEXTS if text]
    assert dataset.num_documents == len(kept)
    for i, text in enumerate(kept):
        assert dataset.document(i).tolist() == [*tokenizer.encode(text), tokenizer.eod]
        assert tokenizer.decode(dataset.document(i)[:-1].tolist()) == text
    manifest = read_manifest(folder / "expected")
    assert manifest and (manifest.documents, manifest.tokens, manifest.vocab_size) == (len(kept), dataset.num_tokens, 400)


def test_every_kind_of_file_gives_the_same_bytes(folder: Path) -> None:
    zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "in.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    (folder / "in.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS)))
    parquet.write_table(pyarrow.table({"n": list(range(len(TEXTS))), "text": TEXTS}), folder / "in.parquet")
    (folder / "texts" / "b").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / "texts" / ("a" if i < 100 else "b/c") / f"{i:03d}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / "texts" / ("a" if i < 100 else "b/c") / f"{i:03d}.txt").write_text(text)
    (folder / "texts" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "texts" / ".hidden").write_text("not a document")
    for name in ("in.jsonl.gz", "in.jsonl.zst", "in.parquet", "texts"):
        run(folder, [name], "out")
        assert_equal_files(folder, "out")


def test_compressed_text_is_known_by_its_first_bytes(folder: Path) -> None:
    zstandard, text = pytest.importorskip("zstandard"), "Grüße.\n" * 200_000  # more than a piece
    inside = folder / "inside"
    inside.mkdir()
    (inside / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (inside / "b.txt.zst").write_bytes(zstandard.compress(text.encode()))
    (inside / "c.txt").write_bytes(gzip.compress(text.encode()))  # its name doesn't say it
    (inside / "d.txt.gz").write_text(text)  # a download that was unpacked on the way
    for name in ("a.txt.gz", "b.txt.zst", "c.txt", "d.txt.gz"):
        assert list(read_texts(find_sources([str(inside / name)]), ["text"])) == [text], name
    (inside / "picture.gz").write_bytes(gzip.compress(b"\x89PNG\0\0"))
    (inside / "cut.gz").write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(ValueError, match="cut.gz can't be decompressed after byte"):
        list(read_texts(find_sources([str(inside)]), ["text"]))
    (inside / "cut.gz").unlink()
    assert list(read_texts(find_sources([str(inside)]), ["text"])) == [text] * 4
    (folder / "e.jsonl").write_bytes(gzip.compress(lines(TEXTS)))
    assert [text for text in read_texts(find_sources([str(folder / "e.jsonl")]), ["text"]) if text] == [t for t in TEXTS if t]
    assert sum(len(part) for part in cut_sources(find_sources([str(folder / "e.jsonl")]), 4)) == 1  # it can't be cut


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (gzip.compress(b"x" * 257 + b"ustar" + b"x" * 250, mtime=0), "is a tar archive: unpack it"),
        (b"BZh91AY\xff", "is compressed by bzip2, which is not read"),
        (b"\xfd7zXZ\0", "is compressed by xz, which is not read"),
        (b"PK\x03\x04\xff", "is compressed in a zip archive, which is not read"),
        (b"caf\xe9", r"is not UTF-8 \(byte 3\): convert it"),
    ],
    ids=["tar", "bzip2", "xz", "zip", "latin-1"],
)
def test_what_else_comes_compressed_is_named(folder: Path, raw: bytes, problem: str) -> None:
    (folder / "x.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=problem):
        list(read_texts(find_sources([str(folder / "x.txt")]), ["text"]))


@pytest.mark.parametrize(("workers", "partitions"), [(2, 1), (2, 2)])
def test_any_number_of_processes_gives_the_same_bytes(folder: Path, workers: int, partitions: int) -> None:
    reports = run(folder, ["in.jsonl"], "out", workers=workers, partitions=partitions)
    assert_equal_files(folder, "out")
    assert not list(folder.glob("*partition*")) and not list(folder.glob("*.partial"))
    assert sum(disk_bytes for disk_bytes, _ in reports) == (folder / "in.jsonl").stat().st_size
    assert sum(text_bytes for _, text_bytes in reports) == sum(len(text.encode()) for text in TEXTS)


@given(
    sizes=st.lists(st.lists(st.integers(0, 30), max_size=8), min_size=1, max_size=4),
    parts=st.integers(1, 6),
    chunk=st.integers(1, 80),
)
def test_a_cut_input_has_every_line_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], parts: int, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    expected = []
    for i, file in enumerate(sizes):
        texts = [f"{i}.{j} " + "x" * size for j, size in enumerate(file)]
        (folder / f"{i}.jsonl").write_bytes(lines(texts).rstrip(b"\n") if i % 2 else lines(texts))
        expected += texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "_CHUNK_BYTES", chunk)
        cut = cut_sources(find_sources([str(folder)]), parts)
        assert [text for part in cut for text in read_texts(part, ["text"])] == expected


def test_several_keys_make_several_datasets(folder: Path) -> None:
    run(folder, ["in.jsonl"], "keys", json_keys=("text", "title"))
    assert_equal_files(folder, "keys_text_document")
    title = IndexedDataset(folder / "keys_title_document").document(1).tolist()
    assert open_tokenizer(str(folder / "tok.model")).decode(title[:-1]) == TEXTS[1][:11]


def test_without_append_eod_there_is_none(folder: Path) -> None:
    run(folder, ["in.jsonl"], "bare", append_eod=False)
    assert 2 not in IndexedDataset(folder / "bare").tokens


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 203 is not JSON"),
        (b"\xff\xfe", "line 203 is not JSON"),
        (b'{"content": "a"}', "line 203 has no text under 'text' .it has keys content.: set --json-keys"),
        (b'{"text": 3}', "line 203 has no text under 'text'"),
        (b"[1]", "line 203 has no text under 'text' .it is a list."),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: bytes, message: str) -> None:
    (folder / "bad.jsonl").write_bytes(lines(TEXTS) + line + b"\n" + lines(TEXTS))
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        run(folder, ["bad.jsonl"], "bad")
    assert not list(folder.glob("bad.bin*")) and not list(folder.glob("bad.idx*"))


def test_a_bad_line_in_a_later_part_has_the_number_of_the_file(folder: Path) -> None:
    (folder / "bad.jsonl").write_bytes(lines(TEXTS) + b"oops\n" + lines(TEXTS))
    size = (folder / "bad.jsonl").stat().st_size
    with pytest.raises(ValueError, match="line 203 is not JSON"):
        list(read_texts([Source(str(folder / "bad.jsonl"), size // 3, size, True)], ["text"]))


def test_bad_input_is_one_line(folder: Path) -> None:
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.jsonl").write_bytes(b'{"text": ""}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS))[:-500])
    (folder / "nothing").mkdir()
    for name, message in {
        "missing.txt": "does not exist",
        "latin.txt": "is not UTF-8",
        "empty.jsonl": "there is no text",
        "cut.jsonl.gz": "can't be decompressed",
        "nothing": "there is no file",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(folder, [name], "bad")
        assert not list(folder.glob("bad.bin*"))
    with pytest.raises(ValueError, match=r"workers \(3\) must be a positive multiple of partitions \(2\)"):
        run(folder, ["in.jsonl"], "bad", workers=3, partitions=2)
    with pytest.raises(ValueError, match="plain text and has no keys"):
        run(folder, ["in.jsonl", str(REPOSITORY / "pyproject.toml")], "bad", json_keys=("text", "title"))


def test_the_two_tools_turn_text_into_a_dataset(folder: Path) -> None:
    trained = done(
        train_tokenizer_main, "--input", folder / "in.jsonl", "--output-prefix", folder / "small", "--vocab-size", 9000
    )
    assert trained.returncode == 0 and "9000 asked for" in trained.stdout
    arguments = ("--output-prefix", folder / "tool", "--tokenizer-model", folder / "tok.model", "--append-eod")
    made = done(preprocess_main, "--input", folder / "in.jsonl", *arguments)
    assert made.returncode == 0 and "201 documents" in made.stdout and made.stderr == ""
    assert_equal_files(folder, "tool")
    failed = done(preprocess_main, "--input", folder / "none.jsonl", *arguments)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
