"""Tokenizers: every text comes back."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.data.bpe import train_bpe
from megalina.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, open_tokenizer

SAMPLE = [Path(__file__).read_text(), "the quick brown fox jumps over the lazy dog\n" * 50, "\tif x:\n\t\treturn 0\r\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "a.model"
    assert train_bpe(SAMPLE, vocab_size=400, path=path) == 400
    return SentencePieceTokenizer(path)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(tokenizer: SentencePieceTokenizer, text: str) -> None:
    for kind in (tokenizer, ByteTokenizer()):
        ids = kind.encode(text)
        assert kind.decode(ids) == text
        assert all(0 <= i < kind.vocab_size and i != kind.eod for i in ids)
        assert kind.encode_many([text, "x", text]) == [ids, kind.encode("x"), ids]


@pytest.mark.parametrize(
    "text", ["\u2581", " \u2581 \u2581\u2581a\u2581", "</s>", "<s>", "<0x41>", "a\0b", "  \n\n   \t x ", "\u00a0é中🙂"]
)
def test_texts_that_look_like_the_tokenizers_own_marks_come_back(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eod not in ids


def test_the_end_of_a_document_is_a_control_piece(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.eod == 2
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eod]) == "ab"


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe(iter(SAMPLE), vocab_size=350, path=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_vocabulary_is_an_upper_limit(tmp_path: Path) -> None:
    pieces = train_bpe(["hello world\n"], vocab_size=8192, path=tmp_path / "a.model")
    assert 262 < pieces < 300
    tokenizer = SentencePieceTokenizer(tmp_path / "a.model")
    assert tokenizer.vocab_size == pieces and tokenizer.decode(tokenizer.encode("wholly other")) == "wholly other"


def test_more_characters_than_pieces_are_written_as_bytes(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(3000))
    assert train_bpe([text * 2], vocab_size=512, path=tmp_path / "a.model") <= 512
    tokenizer = SentencePieceTokenizer(tmp_path / "a.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"), [(SAMPLE, 200, "at least 262"), ([], 500, "empty"), (["\n \n"], 500, "empty")]
)
def test_what_can_not_be_trained_is_refused(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_bpe(texts, vocab_size=vocab_size, path=tmp_path / "a.model")


def test_a_hugging_face_file_is_read(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    hf.train_from_iterator(SAMPLE, trainer)
    hf.save(str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert ours.eod == 0 and ours.vocab_size == hf.get_vocab_size()
    for text in SAMPLE:
        assert ours.encode(text) == hf.encode(text).ids and ours.decode(ours.encode(text)) == text


def test_a_hugging_face_file_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no token that ends a document"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(("name", "message"), [("a.model", "not a sentencepiece model"), ("a.json", "not a Hugging Face")])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, message: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / name).write_text(json.dumps({"not": "a tokenizer"}))
    with pytest.raises(ValueError, match=message):
        open_tokenizer(str(tmp_path / name))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        open_tokenizer(str(tmp_path / f"missing_{name}"))
