"""The interpreter's own corpus: real text, prepared once, and what comes back is what went in."""

import json
import multiprocessing
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalina.config import DataConfig
from megalina.data import corpus
from megalina.data.indexed import IndexedDataset
from megalina.data.source import open_data
from megalina.data.tokenizer import open_tokenizer


def prepare(cache_dir: Path, name: str) -> None:
    corpus.open_corpus(name, vocab_size=512, cache_dir=cache_dir)


PART = ("asyncio", "email", "importlib", "json", "logging", "pydoc_data", "unittest")
library_files = corpus.library_files


@pytest.fixture(scope="module", params=["a part", pytest.param("all", marks=pytest.mark.full)])
def cache_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepared by two processes at once, from some of the library's packages or all of it."""
    folder = tmp_path_factory.mktemp("corpus")
    context = multiprocessing.get_context("fork")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "a part":
            patch.setattr(
                corpus, "library_files", lambda root: {p: f for p, f in library_files(root).items() if p.startswith(PART)}
            )
        processes = [context.Process(target=prepare, args=(folder, name)) for name in corpus.NAMES]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        yield folder


def documents(cache_dir: Path, name: str) -> list[str]:
    opened = corpus.open_corpus(name, vocab_size=512, cache_dir=cache_dir)
    tokenizer, dataset = open_tokenizer(opened.tokenizer_path), IndexedDataset(opened.prefix)
    assert all(dataset.document(i)[-1] == tokenizer.eod for i in range(dataset.num_documents))
    return [tokenizer.decode(dataset.document(i)[:-1].tolist()) for i in range(dataset.num_documents)]


@pytest.mark.full
def test_two_processes_prepare_one_corpus(cache_dir: Path) -> None:
    (folder,) = (path for path in cache_dir.iterdir() if path.is_dir())
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["vocab_size"] == 512 and facts["stdlib"]["documents"] > 100 and facts["stdlib"]["bytes"] > 1e6


def test_the_source_files_come_back_exactly(cache_dir: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {raw.decode(errors="replace") for path, raw in corpus.library_files(root).items() if path != "pydoc_data/topics.py"}
    found = documents(cache_dir, "stdlib")
    assert set(found) <= files and (root / "json" / "decoder.py").read_text() in found
    assert not any("/test/" in f"/{path}" or "site-packages" in path for path in corpus.library_files(root))


def test_the_prose_holds_help_topics_and_docstrings(cache_dir: Path) -> None:
    text = "\n".join(documents(cache_dir, "prose"))
    assert 'The "assert" statement' in text and (json.dumps.__doc__ or "").splitlines()[0] in text and "def dumps(" not in text


def test_both_can_be_blended_and_validated(cache_dir: Path) -> None:
    config = DataConfig(cache_dir=str(cache_dir), vocab_size=512, blend=["0.5", "stdlib", "0.5", "prose"])
    data = open_data(config, seq_len=64, seed=1)
    assert data.vocab_size == 512 and data.tokenizer is not None and data.valid is not None
    assert 3.0 < data.unigram_loss < 6.3
    assert len(data.tokenizer.decode(data.valid.batch(0, 1).tokens_BS[0].tolist())) > 64


def test_a_tokenizer_of_another_kind_is_refused(cache_dir: Path) -> None:
    with pytest.raises(ValueError, match="data.tokenizer=bytes is not the tokenizer of stdlib"):
        open_data(DataConfig(cache_dir=str(cache_dir), vocab_size=512, tokenizer="bytes"), seq_len=64, seed=1)


def test_an_interpreter_without_sources_is_told_of_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stdlib in (tmp_path, tmp_path / "python311.zip"):
        monkeypatch.setattr(sysconfig, "get_paths", lambda stdlib=stdlib: {"stdlib": str(stdlib)})
        with pytest.raises(ValueError, match="data=indexed"):
            corpus.open_corpus("stdlib", vocab_size=512, cache_dir=tmp_path)
