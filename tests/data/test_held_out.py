"""Held-out documents as text."""

from pathlib import Path

import numpy as np
import pytest

from megalina.data import held_out
from megalina.data.gpt_dataset import Span, split_documents
from megalina.data.held_out import HeldOutText
from megalina.data.indexed import IndexedDataset, IndexedWriter
from megalina.data.tokenizer import ByteTokenizer


def test_documents_come_back_as_text_and_from_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for i in range(10):
            writer.add_document([*f"text {i}".encode(), tokenizer.eod])
    with IndexedWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_document([*b"one", tokenizer.eod, *b"two", tokenizer.eod, *b"  ", tokenizer.eod])
    a, b = IndexedDataset(tmp_path / "a"), IndexedDataset(tmp_path / "b")
    last = split_documents(a, [60.0, 40.0])[1]
    assert last is not None
    text = HeldOutText([(a, last), (b, Span(0, 1, 0, b.num_tokens))], tokenizer)
    assert text.documents(seed=0) == ["text 6", "text 7", "text 8", "text 9", "one", "two"]
    assert sorted(text.documents(seed=3)) == sorted(text.documents(seed=0)) != text.documents(seed=3)
    cut = HeldOutText([(b, Span(0, 1, 1, 6))], tokenizer)  # where a split cuts documents
    assert cut.documents(seed=0) == ["ne", "tw"]
    monkeypatch.setattr(held_out, "MOST_DOCUMENTS", 2)
    assert text.documents(seed=0) == ["text 6", "text 8"] and text.documents(seed=1) == ["text 7", "text 9"]
    monkeypatch.setattr(held_out, "MOST_TOKENS", 3)
    monkeypatch.setattr(held_out, "MOST_TOKENS_OF_ALL", 3)
    assert text.documents(seed=0) == ["tex"]
