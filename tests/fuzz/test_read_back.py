"""Files that a run reads back (metrics, manifests, caches, tokenizers) with any bytes: read, left out, or named."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.data.bpe import train_bpe
from megalina.data.cache import cached_arrays
from megalina.data.indexed import Manifest, read_manifest
from megalina.data.tokenizer import open_tokenizer
from megalina.track.metrics import MetricsFile, read_metrics
from tests.fuzz.bounded import outcomes, spoiled
from tools.compare_runs import RunResult

EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["step", "loss", "val_loss", "tokens_per_s"]), inner)
    ),
    max_leaves=6,
)
DEEP = [b"[" * 100_000, b'{"step": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"]
STRANGE = [*DEEP, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": ' + b"9" * 4000 + b"}", b'{"step": -1}', b'{"step": true}']
GOOD_LINE = b'{"step": 1, "loss": 2.5}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("read_back")


@given(
    st.lists(st.one_of(st.binary(max_size=20), JSON.map(lambda v: json.dumps(v).encode()), st.sampled_from(STRANGE)), max_size=3)
)
def test_metrics_may_hold_anything(folder: Path, lines: list[bytes]) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(GOOD_LINE + b"\n".join(lines))
    try:
        records = read_metrics(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: line ")
        assert "\n" not in str(error)
    else:
        assert records[0] == {"step": 1, "loss": 2.5}
        assert all(0 <= record["step"] < 2**63 for record in records)
        run = RunResult("run", {}, records)
        assert run.val_loss is None or run.val_loss + 0.0 is not None
        assert run.tokens_per_s is None or run.tokens_per_s + 0.0 is not None
    MetricsFile(path, resumed_step=2**62).close()  # a run that continues drops what is no record
    assert read_metrics(path)[0] == {"step": 1, "loss": 2.5}


@pytest.mark.parametrize("line", [*STRANGE, b'{"step": 2, "loss": "x"}', b'{"step": 2, "val_loss": [1]}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(GOOD_LINE + line + b"\n" + GOOD_LINE)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a record with a step"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_another_programs_nan_is_none_as_in_our_own_records(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": NaN, "lr": -Infinity}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "lr": None}]


FIELDS = ("tokenizer", "tokenizer_sha256", "vocab_size", "documents", "tokens")


@given(st.one_of(st.binary(max_size=40), JSON.map(lambda v: json.dumps(v).encode()), st.sampled_from(DEEP)))
def test_a_file_that_is_no_manifest_counts_as_none(folder: Path, raw: bytes) -> None:
    (folder / "p.json").write_bytes(raw)
    assert read_manifest(folder / "p") is None


@given(st.lists(JSON, min_size=5, max_size=5))
def test_a_manifest_has_the_types_that_it_promises_or_counts_as_none(folder: Path, values: list[Any]) -> None:
    (folder / "p.json").write_text(json.dumps(dict(zip(FIELDS, values, strict=True))))
    right = all(type(value) is kind for value, kind in zip(values, (str, str, int, int, int), strict=True))
    assert (read_manifest(folder / "p") is not None) == right


def test_a_large_file_with_a_manifests_name_is_not_read(tmp_path: Path) -> None:
    manifest = Manifest("t", "s", 3, 1, 2)
    manifest.write(tmp_path / "p")
    assert read_manifest(tmp_path / "p") == manifest
    with (tmp_path / "p.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert read_manifest(tmp_path / "p") is None


@functools.cache
def array_file(folder: Path) -> bytes:
    np.save(folder / "good.npy", np.arange(50))
    return (folder / "good.npy").read_bytes()


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=4), st.integers(0, 520))
def test_a_spoiled_cache_file_is_refused_with_the_folder_to_remove(folder: Path, edits: list[tuple[int, int]], cut: int) -> None:
    entry = folder / "entry"
    entry.mkdir(exist_ok=True)
    good = array_file(folder)
    (entry / "a.npy").write_bytes(spoiled(good, edits, cut))
    try:
        found = cached_arrays(entry, ["a"], dict)["a"]
    except ValueError as error:
        assert str(error).startswith(f"{entry / 'a.npy'} is damaged ")
        assert str(error).endswith(f"remove {entry}, it is made again")
    else:
        assert found.nbytes <= len(good)
        if not edits and not cut:
            assert found.tolist() == list(range(50))


@pytest.mark.parametrize("raw", [b"", b"PK\3\4abc", b"\x80\x04N.", b"\x93NUMPY\x01\x00"])
def test_a_cache_file_that_is_no_array_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.npy is damaged .* remove"):
        cached_arrays(tmp_path, ["a"], dict)


def test_a_cache_file_of_objects_runs_nothing(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "HARM",))

    np.save(tmp_path / "a.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy is damaged"):
        cached_arrays(tmp_path, ["a"], dict)
    with pytest.raises(ValueError, match=r"b\.npy is damaged"):  # an entry that lacks one
        cached_arrays(tmp_path, ["b"], dict)
    assert not (tmp_path / "HARM").exists()


def test_spoiled_tokenizers_are_refused_or_work(tmp_path: Path) -> None:
    """In a process of its own: their packages are not in Python, and a crash would be the end of it."""
    tokenizers = pytest.importorskip("tokenizers")
    train_bpe(["some text to train on, with wörds"] * 30, vocab_size=300, path=tmp_path / "good.model")
    inner = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")])
    tokenizers.Tokenizer(inner).save(str(tmp_path / "good.json"))
    open_tokenizer(str(tmp_path / "good.json"))
    random = np.random.default_rng(0)
    for suffix in ("model", "json"):
        good = (tmp_path / f"good.{suffix}").read_bytes()
        for i in range(120):
            edits = [(int(random.integers(len(good))), int(random.integers(256))) for _ in range(random.integers(1, 4))]
            cut = int(random.integers(len(good))) if i % 4 == 0 else 0
            (tmp_path / f"spoiled{i}.{suffix}").write_bytes(spoiled(good, edits, cut))
    for name, raw in {"empty": b"", "deep": b"[" * 100_000, "null": b"null"}.items():
        (tmp_path / f"spoiled_{name}.json").write_bytes(raw)
        (tmp_path / f"spoiled_{name}.model").write_bytes(raw)
    code = """
from pathlib import Path
from megalina.data.tokenizer import open_tokenizer
def use(path):
    tokenizer = open_tokenizer(str(path))
    try:
        ids = tokenizer.encode("ab some wörds\\n\\0")
        tokenizer.decode(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in [*ids, tokenizer.eod])
    except BaseException as error:
        raise RuntimeError(f"opened, but {error!r}") from error
for path in sorted(Path(sys.argv[1]).glob("spoiled*")):
    attempt(path.name, lambda: use(path))
"""
    found = outcomes(code, str(tmp_path))
    assert len(found) == 246
    bad = {name: outcome for name, outcome in found.items() if outcome[0] not in ("ok", "ValueError")}
    assert not bad
    assert all(f"{tmp_path}/{name}" in message for name, (kind, message) in found.items() if kind == "ValueError")
    assert {"ok", "ValueError"} == {kind for kind, _ in found.values()}


def test_a_token_id_beyond_any_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "</s>": 3}, merges=[])
    (tmp_path / "far.json").write_text(tokenizers.Tokenizer(inner).to_str().replace('"b":1', '"b":2147483648'))
    with pytest.raises(ValueError, match=r"far\.json has the token id 2147483648: at most 16777216 ids are possible"):
        open_tokenizer(str(tmp_path / "far.json"))
