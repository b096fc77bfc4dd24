"""The interpreter's own corpus: its standard library as two sets of documents, prepared once.

"stdlib" is the library's Python source, a document a file; "prose" its English: the help topics, a document each, and the
docstrings, a document a file.  Tests, site-packages and files that aren't UTF-8 are left out.  Both use one tokenizer, trained on
both, so they can be blended.  The help topics are in "prose" alone; the docstrings are part of the source too, so they are no
unseen text for a model that was trained on "stdlib".
"""

import ast
import hashlib
import json
import os
import platform
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from megalina.data.bpe import train_bpe
from megalina.data.cache import cache_entry
from megalina.data.indexed import IndexedWriter, Manifest, best_dtype, tokenizer_sha256
from megalina.data.preprocess import encode_documents
from megalina.data.tokenizer import SentencePieceTokenizer

NAMES = ("stdlib", "prose")
_FORMAT = "1"  # raise it when preparation changes, so that older entries aren't used
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"
_ENOUGH_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Corpus:
    prefix: str
    tokenizer_path: str


def open_corpus(name: str, *, vocab_size: int, cache_dir: Path) -> Corpus:
    """Prepares both sets on first use.  ValueError where this interpreter comes without sources."""
    files = library_files(Path(sysconfig.get_paths()["stdlib"]))
    digest = hashlib.sha256(f"{_FORMAT} {vocab_size} {platform.python_version()}\n".encode())
    for path, raw in files.items():
        digest.update(f"{path} {len(raw)}\n".encode() + raw)
    sha256 = digest.hexdigest()
    folder = cache_entry(cache_dir / f"corpus-{sha256[:16]}", lambda new: _prepare(new, files, vocab_size, sha256))
    return Corpus(str(folder / name), str(folder / "tokenizer.model"))


def library_files(root: Path) -> dict[str, bytes]:
    """Path below `root` -> content of the library's source files.  ValueError where there are next to none."""
    files = {}
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _LEFT_OUT)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    total_bytes = sum(map(len, files.values()))
    if total_bytes < _ENOUGH_BYTES:
        raise ValueError(
            f"this interpreter has {total_bytes} bytes of standard library source in {root}, too few to train on: install the "
            "full Python package, or use data=indexed with a corpus of your own (tools/preprocess_data.py)"
        )
    return files


def _prepare(folder: Path, files: dict[str, bytes], vocab_size: int, sha256: str) -> None:
    begin_s = time.monotonic()
    print(f"preparing the text of Python {platform.python_version()}'s standard library, once ...", file=sys.stderr, flush=True)
    sources, skipped = _decoded(files)
    prose = _prose(sources)
    topics = sources.pop(_TOPICS, "")
    model_path = folder / "tokenizer.model"
    train_bpe([*sources.values(), topics], vocab_size=vocab_size, path=model_path)
    tokenizer = SentencePieceTokenizer(model_path)
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "sha256": sha256,
        "vocab_size": tokenizer.vocab_size,
        "skipped": skipped,
    }
    for name, documents in (("stdlib", sources), ("prose", prose)):
        # by hash of the name: any contiguous share of the documents is a fair mix of the whole
        order = sorted(documents, key=lambda key: hashlib.sha256(key.encode()).digest())
        facts[name] = _write(folder / name, [documents[key] for key in order], tokenizer, model_path)
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
    megabytes, took_s = sum(map(len, files.values())) / 1e6, time.monotonic() - begin_s
    print(f"prepared {megabytes:.1f} MB in {took_s:.1f} s, every file decodes to itself", file=sys.stderr, flush=True)


def _decoded(files: dict[str, bytes]) -> tuple[dict[str, str], list[str]]:
    texts, skipped = {}, []
    for path, raw in files.items():
        try:
            texts[path] = raw.decode()
        except UnicodeDecodeError:
            skipped.append(path)
    return {path: text for path, text in texts.items() if text}, skipped


def _write(prefix: Path, documents: list[str], tokenizer: SentencePieceTokenizer, model_path: Path) -> dict[str, int]:
    encoded = encode_documents(tokenizer, documents, append_eod=True)
    at = 0
    for text, length in zip(documents, encoded.lengths, strict=True):
        if tokenizer.decode(encoded.tokens[at : at + length - 1].tolist()) != text:
            raise ValueError(f"the tokenizer does not give back the text that begins {text[:60]!r}: please report it")
        at += int(length)
    with IndexedWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer:
        writer.add_documents(encoded.tokens, encoded.lengths)
    sha256 = tokenizer_sha256(str(model_path))
    Manifest(model_path.name, sha256, tokenizer.vocab_size, len(documents), len(encoded.tokens)).write(prefix)
    return {"documents": len(documents), "tokens": len(encoded.tokens), "bytes": encoded.text_bytes}


def _prose(sources: dict[str, str]) -> dict[str, str]:
    """Name of the document -> text."""
    prose: dict[str, str] = {}
    for path, text in sources.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the library's own strings
            try:
                tree = ast.parse(text)
            except SyntaxError:
                continue  # a template or a file for another version: it has no docstrings to read
        if path == _TOPICS:
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                    topics: dict[str, str] = ast.literal_eval(node.value)
                    prose |= {f"topic {name}": topic for name, topic in topics.items() if topic.strip()}
            continue
        docstrings = [
            docstring
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and (docstring := ast.get_docstring(node))
        ]
        if docstrings:
            prose[path] = "\n\n".join(docstrings) + "\n"
    return prose
