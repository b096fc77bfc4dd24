"""Train a sentencepiece tokenizer on your own text.

    python tools/train_tokenizer.py --input corpus.jsonl notes/ --output-prefix my --vocab-size 8192

writes my.model, from which every text comes back exactly as it was.  A small text gets fewer pieces.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megalina.arguments import Parser, number, whole


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".txt, .jsonl (also .gz, .zst), .parquet, folders")
    parser.add_argument("--output-prefix", required=True, help="PREFIX of PREFIX.model")
    parser.add_argument("--vocab-size", type=whole(1, 2**24), required=True, help="number of pieces, an upper limit")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="where the text is in JSON lines and parquet rows (default: text)"
    )
    parser.add_argument(
        "--sample-mb", type=number(above=True), default=100.0, help="a random sample of at most this much text (default: 100)"
    )
    options = parser.parse_args(argv)
    from megalina.data.bpe import train_bpe
    from megalina.data.documents import find_sources, read_texts

    path = Path(f"{options.output_prefix}.model")
    try:
        texts = read_texts(find_sources(options.input), options.json_keys)
        pieces = train_bpe(texts, vocab_size=options.vocab_size, path=path, sample_mb=options.sample_mb)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; choose another --input or --output-prefix", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    note = f" ({options.vocab_size} asked for, the text has no more)" if pieces < options.vocab_size else ""
    print(f"{path}: {pieces} pieces{note}")
    return 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
