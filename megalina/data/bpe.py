"""Training of a sentencepiece BPE model from which every text comes back exactly as it was."""

import io
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

_PIECE_CHARS = 2048  # the trainer sees texts in pieces of this length
_SMALLEST = 3 + 2 + 256  # unknown, begin, end; newline, tab; every byte


def train_bpe(texts: Iterable[str], *, vocab_size: int, path: Path, sample_mb: float = 100.0) -> int:
    """Write a model of at most `vocab_size` pieces to `path`; returns the number of its pieces, fewer for a small text.

    ids: 0 unknown, 1 begin, 2 end of document, then newline, tab, 256 bytes, merges and single characters.  Characters that are
    rare, or too many for the vocabulary, are written as bytes.  Of more than `sample_mb` MB of text a random sample (always the
    same one) is used.  ValueError where the text is empty or the vocabulary too small for the bytes.
    """
    if vocab_size < _SMALLEST + 1:
        raise ValueError(f"a tokenizer with byte fallback needs at least {_SMALLEST + 1} pieces, not {vocab_size}: raise it")
    pieces = _sample(_pieces(texts), max(1, round(sample_mb * 1e6 / _PIECE_CHARS)))
    if not any(piece.strip() for piece in pieces):
        raise ValueError("there is no text to train a tokenizer on: the input is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_without_rare_characters(pieces, vocab_size)),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=16384,  # bytes: more than a piece can have
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece could not train {vocab_size} pieces on {len(pieces)} pieces of text: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARS):
            yield text[start : start + _PIECE_CHARS].replace("\0", "")  # the trainer would skip a piece with a NUL


def _sample(pieces: Iterable[str], limit: int) -> list[str]:
    """At most `limit` of them, each with the same chance, in memory of that size."""
    chance = random.Random(0)
    kept: list[str] = []
    for i, piece in enumerate(pieces):
        if i < limit:
            kept.append(piece)
        elif (slot := chance.randrange(i + 1)) < limit:
            kept[slot] = piece
    return kept


def _without_rare_characters(pieces: list[str], vocab_size: int) -> list[str]:
    """Characters beyond 99.95% of the text, or beyond what half of the pieces can hold, become line ends: no merge crosses them.

    The trainer has an option for this, but it gives up where fewer than 98% would be covered.
    """
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece)
    room, enough = (vocab_size - _SMALLEST + 1) // 2, 0.9995 * counts.total()
    rare, covered = "", 0
    for i, (character, count) in enumerate(counts.most_common()):
        if i >= room or covered >= enough:
            rare += character
        covered += count
    return [re.sub(f"[{re.escape(rare)}]", "\n", piece) for piece in pieces] if rare else pieces
