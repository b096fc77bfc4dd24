"""Turn text into token ids that training reads: PREFIX.bin and PREFIX.idx in Megatron's format.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix my --tokenizer-model my.model --append-eod --workers 4
    python pretrain_gpt_moe.py data=indexed data.prefix=my data.tokenizer=my.model

A line of .jsonl, a row of .parquet and any other text file are one document each.  The output is the same whatever the number
of workers and partitions.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from megalina.arguments import Parser, whole

MOST_WORKERS = 1024  # processes of one machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".txt, .jsonl (also .gz, .zst), .parquet, folders")
    parser.add_argument("--output-prefix", required=True, help="PREFIX of .bin and .idx; several keys: PREFIX_KEY_document")
    parser.add_argument("--tokenizer-model", required=True, help='sentencepiece .model, tokenizer.json, or "bytes"')
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="one dataset for each of these keys (default: text)")
    parser.add_argument("--append-eod", action="store_true", help="an end-of-document token after each document")
    parser.add_argument("--workers", type=whole(1, MOST_WORKERS), default=1, help="processes that encode (default: 1)")
    parser.add_argument(
        "--partitions", type=whole(1, MOST_WORKERS), default=1, help="parts of the input read at once (default: 1)"
    )
    options = parser.parse_args(argv)
    from megalina.cli.progress import SpeedDisplay
    from megalina.data.documents import find_sources
    from megalina.data.preprocess import Recipe, output_prefixes, preprocess

    recipe = Recipe(options.tokenizer_model, tuple(options.json_keys), options.append_eod)
    begin_s = time.monotonic()
    try:
        sources = find_sources(options.input)
        total_bytes = sum(source.stop - source.start for source in sources)
        with SpeedDisplay("preprocessing", total_bytes) as display:
            totals = preprocess(
                sources,
                options.output_prefix,
                recipe,
                workers=options.workers,
                partitions=options.partitions,
                advance=display.advance,
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    took_s = time.monotonic() - begin_s
    for prefix, total in zip(output_prefixes(options.output_prefix, options.json_keys), totals, strict=True):
        megabytes = total.text_bytes / 1e6
        size = f"{total.documents} documents, {total.tokens} tokens, {megabytes:.1f} MB"
        print(f"{prefix}.bin, .idx: {size}, {megabytes / took_s:.1f} MB/s")
    return 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
