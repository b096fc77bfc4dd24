"""Let a checkpoint of any layout write on from a prompt, on one process.

python tools/generate.py RUN/checkpoints/step_00000200 --prompt "def main():"
python tools/generate.py RUN --prompt "class " --temperature 0        # the newest checkpoint of a run
python tools/generate.py RUN infer.select=top_k infer.select_k=2      # of a model of router=dense: so many experts a token
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from megalina.arguments import Parser, number, whole
from megalina.blocks.selection import selection_of
from megalina.checkpoint.files import left_out, newest_checkpoint, read_values
from megalina.config import InferConfig, RouterConfig
from megalina.console import check_text, command
from megalina.serve.modes import read_overrides


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder: its newest checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="infer.select...=VALUE", help="which experts tokens use of a model "
                        "of router=dense: infer.select, infer.select_k, infer.select_threshold")  # fmt: skip
    parser.add_argument("--prompt", default="", help="the beginning of the text; empty: a new document")
    parser.add_argument("--max-tokens", type=whole(1, 2**31 - 1), default=200, help="tokens to write (default 200)")
    parser.add_argument("--temperature", type=number(0, 1e6), default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument(
        "--top-p",
        type=number(0, 1, above=True),
        default=0.95,
        help="of the likeliest tokens with this total probability (default 0.95)",
    )
    parser.add_argument(
        "--seed", type=whole(-(2**63), 2**63 - 1), default=0, help="the same seed gives the same text (default 0)"
    )
    parser.add_argument("--tokenizer", default="", help="where it lies now, if not where the checkpoint says")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (default cpu)")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        return write_on(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def write_on(options: argparse.Namespace) -> int:
    check_text([options.prompt], "--prompt")
    path = options.checkpoint
    if (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path} has no checkpoint yet")
        path = newest
    values = read_values(path)
    config = values["config"]
    if others := [text for text in options.overrides if not text.startswith("infer.select")]:
        raise ValueError(f"{others[0]}: here only infer.select, infer.select_k and infer.select_threshold can be given")
    infer = InferConfig(**read_overrides(options.overrides))
    selection = selection_of(infer, RouterConfig(**config["router"]), config["model"]["num_experts"])
    import torch  # seconds, which a mistake need not wait for

    from megalina.checkpoint.loaded_model import load_model
    from megalina.data.tokenizer import open_tokenizer
    from megalina.generate import Sampling, generate

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}, but torch sees no GPU: leave it out")
    loaded = load_model(path, device=options.device)
    loaded.gpt.select(selection)
    tokenizer_path = options.tokenizer or loaded.tokenizer_path
    if not tokenizer_path:
        raise ValueError(f"{path} was trained on token ids without a tokenizer; name one with --tokenizer")
    tokenizer = open_tokenizer(tokenizer_path)
    ids, words = tokenizer.vocab_size, loaded.gpt.vocab_size
    if ids > words or (ids < words and loaded.gpt.config.vocab_size == 0):  # only model.vocab_size makes room for more
        raise ValueError(
            f"{tokenizer_path} has {ids} ids, the model {words}: give the tokenizer it was trained with as --tokenizer"
        )
    written = tokenizer.encode(options.prompt) or [tokenizer.eod]
    shown = tokenizer.decode(written)
    sampling = Sampling(
        max_tokens=options.max_tokens,
        max_positions=loaded.max_positions,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop_token=tokenizer.eod,
        num_ids=tokenizer.vocab_size,
    )
    tokens = generate(loaded.gpt, list(written), sampling)
    if note := left_out(values):
        print(note, file=sys.stderr)
    first = list(islice(tokens, 1))  # before anything is shown: what is wrong comes out here
    sys.stdout.write(options.prompt)
    for token in chain(first, tokens):
        if token == tokenizer.eod:
            break
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # else the bytes of a character are still incomplete
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print()
    return 0


if __name__ == "__main__":
    command(main)
