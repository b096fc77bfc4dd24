"""A tokenizer: text to token ids and back.

Three kinds: sentencepiece models, Hugging Face `tokenizers` files and plain bytes.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character, so a real one would come back as a space
MAX_VOCABULARY = 1 << 24  # ids; a table of more of them is more likely a damaged file than a vocabulary
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "<end_of_sentence>")


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int:
        """The id that ends a document; no text encodes to it."""

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The same as `encode` on each, on one core, with less overhead."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self) -> list[int] | None:
        """Of each id, the bytes of text that it stands for; 0 for ends of documents.  None where an id alone doesn't say."""


class SentencePieceTokenizer:
    """A sentencepiece model from a file.

    With a model as `train_tokenizer.py` makes it, every text that UTF-8 can write comes back as it was.  The one character that
    sentencepiece itself would lose, U+2581, is written as its three bytes.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._model.id_to_piece(list(range(self._model.get_piece_size())))  # a damaged piece isn't UTF-8
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: make one with tools/train_tokenizer.py") from error
        self.vocab_size: int = self._model.get_piece_size()
        self.eod: int = self._model.eos_id()
        if self.eod < 0:
            raise ValueError(f"{path} has no end-of-sentence piece, which ends documents here: train it with eos_id=2")
        bytes_of_mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        can_spell = all(self._model.is_byte(piece) for piece in bytes_of_mark)
        # a model that adds a space in front of a text would add one in front of each part of it too
        adds_space = self._model.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
        self._mark: list[int] = bytes_of_mark if can_spell and not adds_space else []

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        all_ids: list[list[int]] = self._model.encode(texts, out_type=int, num_threads=1)
        if self._mark:
            for i, text in enumerate(texts):
                if _SPACE_MARK in text:
                    all_ids[i] = self._spell_marks(text)
        return all_ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids])
        return text

    def token_bytes(self) -> list[int]:
        """An unknown piece counts as one byte: it stands for at least that."""
        model, pieces = self._model, range(self.vocab_size)
        text = [model.id_to_piece(i).replace(_SPACE_MARK, " ") for i in pieces]
        one = [model.is_byte(i) or model.is_unknown(i) for i in pieces]
        none = [model.is_control(i) or model.is_unused(i) for i in pieces]
        return [0 if none[i] else 1 if one[i] else len(text[i].encode()) for i in pieces]

    def _spell_marks(self, text: str) -> list[int]:
        first, *rest = self._model.encode(text.split(_SPACE_MARK), out_type=int, num_threads=1)
        ids: list[int] = list(first)
        for part in rest:
            ids += self._mark
            ids += part
        return ids


class HuggingFaceTokenizer:
    """A tokenizer.json, read with the `tokenizers` package."""

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{path} needs the package tokenizers: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception for a file that it can't read
            raise ValueError(f"{path} is not a Hugging Face tokenizer file: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocab[name] for name in _END_NAMES if name in vocab]
        if not ends:
            raise ValueError(f"{path} has no token that ends a document (none of {', '.join(_END_NAMES)}): add one of them")
        self.eod: int = ends[0]
        self.vocab_size: int = max(vocab.values()) + 1
        if self.vocab_size > MAX_VOCABULARY:
            raise ValueError(f"{path} has the token id {self.vocab_size - 1}: at most {MAX_VOCABULARY} ids are possible")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_bytes(self) -> list[int] | None:
        """Of byte-level tokenizers (GPT-2's kind) and of those that mark spaces (Llama's kind); None of others."""
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {"type": ""}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        out = [0] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                out[i] = 0 if added[i].special else len(token.encode())
            elif "ByteLevel" in kinds:
                out[i] = len(token)  # a character stands for a byte
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                out[i] = 1
            else:
                out[i] = len(token.replace(_SPACE_MARK, " ").encode())
        return out


class ByteTokenizer:
    """The bytes of UTF-8 are the ids 0 to 255; 256 ends a document."""

    vocab_size: int = 257
    eod: int = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that aren't UTF-8 become U+FFFD; ends of documents and padding are left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> list[int]:
        return [1] * 256 + [0]


def open_tokenizer(path: str) -> Tokenizer:
    """`path`: a sentencepiece .model, a Hugging Face .json, or the word "bytes"."""
    if path == "bytes":
        return ByteTokenizer()
    if not Path(path).is_file():
        raise ValueError(f'there is no tokenizer {path}: give a sentencepiece .model, a Hugging Face tokenizer.json or "bytes"')
    if path.endswith(".json"):
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)
