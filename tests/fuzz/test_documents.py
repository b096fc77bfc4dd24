"""Files of text with any bytes: their documents come, or a ValueError names the file and the line."""

import functools
import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megalina.data.documents import find_sources, read_chunks, texts
from megalina.data.preprocess import Recipe, preprocess
from tests.fuzz.bounded import outcomes, spoiled

EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
LINES = b"".join(json.dumps({"text": f"line {i}", "n": i}).encode() + b"\n" for i in range(300))
ODD_LINES = st.one_of(
    st.binary(max_size=40),
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)).map(
        lambda value: json.dumps({"text": value}).encode()
    ),
    st.sampled_from(
        [
            b'{"text": "ok"}',
            b'{"text": "ok", "n": ' + b"9" * 5000 + b"}",
            b'{"text": "\\ud800"}',
            b'{"\\udfff": 1, "a\\nb": 2}',
            b'{"text": "a\\u0000b"}',
            b"[" * 100_000,
            b'{"text": "ok", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"a":' * 50_000,
            b"\xff\xfe{\x00",
            b"\xef\xbb\xbf{}",
            b"\x00" * 64,
            b'{"text": 1e999999}',
            b"NaN",
        ]
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@functools.cache
def packed(kind: str) -> bytes:
    return gzip.compress(LINES) if kind == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(LINES)


def read_all(path: Path) -> list[str]:
    found = []
    for source in find_sources([str(path)]):
        for chunk in read_chunks(source):
            found += texts(chunk, ["text"])[0]
    return found


def comes_or_is_named(path: Path) -> list[str] | None:
    try:
        found = read_all(path)
    except ValueError as error:
        assert str(error).startswith(str(path)), error
        assert "\n" not in str(error)
        str(error).encode()  # a lone surrogate could not be printed
        return None
    for text in found:
        text.encode()  # a lone surrogate would stop the tokenizer
    return found


@given(st.lists(ODD_LINES, max_size=4))
def test_json_lines_may_be_anything(folder: Path, lines: list[bytes]) -> None:
    path = folder / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"\n".join(lines))
    comes_or_is_named(path)


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"text": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a":' * 50_000]
)
def test_deep_nesting_is_refused_with_its_line(folder: Path, line: bytes) -> None:
    (folder / "deep.jsonl").write_bytes(b'{"text": "first"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"deep\.jsonl, line 2 is not JSON that can be read \(maximum recursion"):
        read_all(folder / "deep.jsonl")


def test_keys_are_shown_in_one_line_that_can_be_printed(folder: Path) -> None:
    (folder / "keys.jsonl").write_bytes(json.dumps({"\ud800": 1, "a\nb": 2, "k" * 1000: 3}).encode())
    with pytest.raises(ValueError, match=re.escape(r"(it has keys \ud800, a\nb, " + "k" * 40 + ")")):
        read_all(folder / "keys.jsonl")


@given(st.sampled_from(["gz", "zst"]), EDITS, st.integers(0, 200))
def test_a_spoiled_compressed_file_is_refused_or_whole(folder: Path, kind: str, edits: list[tuple[int, int]], cut: int) -> None:
    path = folder / f"a.jsonl.{kind}"
    path.write_bytes(spoiled(packed(kind), edits, cut))
    found = comes_or_is_named(path)
    assert found is None or len(found) == 300


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_anywhere_is_refused(folder: Path, kind: str) -> None:
    path, whole = folder / f"cut.jsonl.{kind}", packed(kind)
    path.write_bytes(whole * 2)  # members and frames may follow each other
    assert len(read_all(path)) == 600
    for size in [*range(1, len(whole), 41), len(whole) - 1, len(whole) + 20]:
        path.write_bytes((whole * 2)[:size])
        with pytest.raises(ValueError, match=rf"cut\.jsonl\.{kind} can't be decompressed after line \d+: "):
            read_all(path)


@given(EDITS, st.integers(0, 2))
def test_a_spoiled_parquet_file_is_refused_or_read(folder: Path, edits: list[tuple[int, int]], cut: int) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good, path = folder / "good.parquet", folder / "a.parquet"
    if not good.exists():
        parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(200)], "n": list(range(200))}), good)
    path.write_bytes(spoiled(good.read_bytes(), edits, cut * 150))
    comes_or_is_named(path)


@given(st.binary(max_size=80))
def test_plain_text_is_utf8_or_named_with_the_byte(folder: Path, raw: bytes) -> None:
    path = folder / "a.txt"
    path.write_bytes(raw)
    assert comes_or_is_named(path) in (None, [raw.decode(errors="replace")])


@pytest.mark.full
def test_bombs_and_long_lines_are_refused_within_a_bounded_memory(tmp_path: Path) -> None:
    size = 270 << 20
    packer = zstandard.ZstdCompressor().compressobj()
    zero = bytes(1 << 20)
    bomb = b"".join([packer.compress(zero) for _ in range(size >> 20)]) + packer.flush()
    (tmp_path / "bomb.jsonl.zst").write_bytes(b"".join([bomb] * 4))
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(size >> 20):
            file.write(zero)
    with open(tmp_path / "long.jsonl", "wb") as file:
        file.truncate(size)
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(1 << 33)
    (tmp_path / "good.jsonl").write_bytes(b'{"text": "' + b"a" * (100 << 20) + b'"}\n')
    code = """
from pathlib import Path
from megalina.data.documents import find_sources, read_chunks, texts
import zstandard
limit(900)
def read(name):
    for source in find_sources([sys.argv[1] + "/" + name]):
        for chunk in read_chunks(source):
            assert len(texts(chunk, ["text"])[0][0]) == 100 << 20
for name in ("good.jsonl", "bomb.jsonl.zst", "bomb.jsonl.gz", "long.jsonl", "huge.txt"):
    attempt(name, lambda: read(name))
"""
    found = outcomes(code, str(tmp_path))
    assert found.pop("good.jsonl") == ("ok", "")
    kind, message = found.pop("huge.txt")
    assert kind == "ValueError" and "huge.txt has 8589934592 bytes, and one document at most" in message
    for name, (kind, message) in found.items():
        assert kind == "ValueError" and f"{name}, line 1 has more than 268435456 bytes" in message, (name, kind, message)


@pytest.mark.parametrize("name", ["corpus.json", "corpus.bin"])
def test_preprocessing_never_replaces_its_own_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b'{"text": "abc"}\n')
    with pytest.raises(ValueError, match=f"the output corpus{name[6:]} would replace an input"):
        preprocess(find_sources([f"./{name}"]), "corpus", Recipe("bytes"), advance=lambda disk, text: None)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b'{"text": "abc"}\n')]
