"""GPT datasets: packed sequences, against the shuffled text written out in full."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.data import gpt_dataset as gpt_dataset_module
from megalina.data.gpt_dataset import GPTDataset, Span, split_documents
from megalina.data.indexed import IndexedDataset, IndexedWriter


def make(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Documents of these lengths; the tokens are 0, 1, 2, ..., so that a token tells where it is from."""
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add_documents(np.arange(sum(lengths)), np.array(lengths))
    return IndexedDataset(prefix)


def everything(dataset: IndexedDataset) -> Span:
    return Span(0, dataset.num_documents, 0, dataset.num_tokens)


def opened(
    dataset: IndexedDataset, folder: Path, *, span: Span | None = None, seq_len: int = 8, repeat: bool = True
) -> GPTDataset:
    return GPTDataset(dataset, span or everything(dataset), seq_len=seq_len, seed=5, repeat=repeat, cache_dir=folder)


LENGTHS = [5, 1, 0, 17, 30, 2, 9, 0, 11]  # 75 tokens: 9 sequences of 8 an epoch


def test_an_epoch_is_the_shuffled_documents_cut_and_shuffled(tmp_path: Path) -> None:
    dataset = make(tmp_path / "a", LENGTHS)
    packed = opened(dataset, tmp_path)
    assert packed.num_sequences == 9
    documents = {tuple(dataset.document(i).tolist()) for i in range(9)} - {()}
    for epoch in range(3):
        got = [packed.sequence(epoch * 9 + i) for i in range(9)]
        by_begin = {int(sequence.tokens[0]): sequence for sequence in got}
        assert len(by_begin) == 9
        heads = {int(s.tokens[0]) for s in got} - {int(s.tokens[-1]) for s in got}
        assert len(heads) == 1  # every sequence but the first begins with the last label of another
        text, ends, at = [], [], heads.pop()
        while at in by_begin:
            text += by_begin[at].tokens[:-1].tolist()
            ends += by_begin[at].ends[:-1].tolist()
            at = int(by_begin[at].tokens[-1])
        found, document = set(), []
        for token, end in zip(text, ends, strict=True):
            document.append(token)
            if end:
                found.add(tuple(document))
                document = []
        assert found <= documents and any(other[: len(document)] == tuple(document) for other in documents - found)


def test_an_end_is_where_another_document_begins(tmp_path: Path) -> None:
    dataset = make(tmp_path / "a", LENGTHS)
    packed = opened(dataset, tmp_path)
    begins = set(dataset.document_starts(0, dataset.num_documents).tolist())
    for n in range(30):
        sequence = packed.sequence(n)
        assert sequence.ends.tolist() == [token + 1 in begins for token in sequence.tokens.tolist()]


def test_epochs_have_different_orders_of_documents_and_sequences(tmp_path: Path) -> None:
    packed = opened(make(tmp_path / "a", LENGTHS), tmp_path)
    epochs = [[tuple(packed.sequence(9 * epoch + i).tokens.tolist()) for i in range(9)] for epoch in range(2)]
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])


def test_a_sequence_does_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    dataset = make(tmp_path / "a", LENGTHS)
    forward = opened(dataset, tmp_path)
    expected = [forward.sequence(n).tokens.tolist() for n in range(50)]
    for n in (49, 0, 30, 10, 31):
        assert opened(dataset, tmp_path).sequence(n).tokens.tolist() == expected[n]


def test_an_index_on_disk_is_the_index_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(tmp_path / "a", LENGTHS)
    memory = opened(dataset, tmp_path / "cache")
    expected = [memory.sequence(n).tokens.tolist() for n in range(40)]
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(gpt_dataset_module, "_KEPT_FROM", 1)
    for _ in range(2):  # built, then read
        disk = opened(dataset, tmp_path / "cache")
        assert [disk.sequence(n).tokens.tolist() for n in range(40)] == expected
    assert len(list((tmp_path / "cache").glob("index-*/epoch-*/order.npy"))) == 5


@pytest.mark.parametrize("lengths", [[1, 1], [3], [2, 0, 4], [8]])
def test_a_text_shorter_than_a_sequence_is_repeated_for_training(tmp_path: Path, lengths: list[int]) -> None:
    packed = opened(make(tmp_path / "a", lengths), tmp_path)
    for n in range(20):
        sequence = packed.sequence(n)
        assert sequence.num_tokens == 9 and set(sequence.tokens.tolist()) <= set(range(sum(lengths)))


def test_a_text_shorter_than_a_sequence_is_padded_for_validation(tmp_path: Path) -> None:
    packed = opened(make(tmp_path / "a", [3, 2]), tmp_path, repeat=False)
    assert packed.num_sequences == 1
    sequence = packed.sequence(7)
    assert sequence.num_tokens == 5 and sorted(sequence.tokens[:5].tolist()) == [0, 1, 2, 3, 4] and not sequence.tokens[5:].any()


def test_without_repeat_the_same_sequences_come_again(tmp_path: Path) -> None:
    packed = opened(make(tmp_path / "a", LENGTHS), tmp_path, repeat=False)
    assert [packed.sequence(n).tokens.tolist() for n in range(9)] == [packed.sequence(n + 9).tokens.tolist() for n in range(9)]


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 0),
    shares=st.lists(st.sampled_from([0.0, 1.0, 30.0, 969.0]), min_size=3, max_size=3).filter(lambda shares: shares[0] > 0),
)
def test_shares_are_contiguous_and_none_is_forgotten(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shares: list[float]
) -> None:
    dataset = make(tmp_path_factory.mktemp("split") / "a", lengths)
    spans = split_documents(dataset, shares)
    at = 0
    for span, share in zip(spans, shares, strict=True):
        assert share > 0 or span is None
        if span is not None:
            assert span.first_token == at and span.last_token > at
            assert dataset.document_start(span.first_document) <= at and span.last_token <= dataset.document_start(
                span.last_document
            )
            at = span.last_token
    assert at == dataset.num_tokens
    if 0 not in lengths and len(lengths) >= 3:
        assert [span is not None for span in spans] == [share > 0 for share in shares]


def test_the_usual_split_is_in_proportion(tmp_path: Path) -> None:
    spans = split_documents(make(tmp_path / "a", [2] * 1000), [969, 30, 1])
    assert [(s.first_document, s.last_document) for s in spans if s] == [(0, 969), (969, 999), (999, 1000)]


def test_one_document_is_split_at_a_token(tmp_path: Path) -> None:
    dataset = make(tmp_path / "a", [1000])
    spans = split_documents(dataset, [90, 10, 0])
    assert spans == [Span(0, 1, 0, 900), Span(0, 1, 900, 1000), None]
    packed = opened(dataset, tmp_path, span=spans[1], repeat=False)
    assert sorted(int(packed.sequence(n).tokens[0]) for n in range(packed.num_sequences)) == list(range(900, 996, 8))
