"""Record the routing of a checkpoint over held-out text, on one process: the profile from which serving foresees popularity.

python tools/record_routing.py RUN                                    # its newest checkpoint, over the run's validation text
python tools/record_routing.py RUN/checkpoints/step_00000200 --data TEXT --tokens 65536 --out trace.npz
python tools/record_routing.py RUN --training 640 --dtype bfloat16 --logprobs --out server.npz      # docs/router-twin.md

It writes CHECKPOINT/routing.npz unless --out says otherwise: of each token the experts that it chose in each MoE layer, best
first (largest gate weight first), and their weights; and what each layer's router says when it is asked one MoE layer ahead, so
that look-ahead predictors can be judged without the model.  That is always there, since it is little: a norm and a router more a
layer, and a seventh more bytes.  The tokens are there too, so that a router can replay the choices (router.replay=FILE); a
sequence that --tokens cuts off can't be replayed.  The checkpoint stays whole, with or without the file.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megalina.arguments import Parser, whole
from megalina.checkpoint.files import newest_checkpoint, read_values
from megalina.checkpoint.profile import PROFILE

if TYPE_CHECKING:
    import numpy as np
    import rich.progress

    from megalina.batch import Batch
    from megalina.data.indexed import IndexedDataset
    from megalina.data.source import PackedSamples, Samples
    from megalina.data.tokenizer import Tokenizer
    from megalina.placement.placement import Placement
    from megalina.placement.routing_trace import RoutingTrace

BATCH_TOKENS = 4096  # that go through the model at a time, at least one sequence
MOST_TOKENS = 1 << 24
DEVICES = 4


@dataclass(frozen=True, slots=True)
class Text:
    """What the model reads."""

    samples: "Samples"
    num_sequences: int  # so many
    name: str
    first: int = 0  # from this number on


class Shown:
    """How far it is, on stderr: a bar with the time left on a terminal, else a line now and then."""

    def __init__(self, total_tokens: int):
        self._total_tokens, self._done_tokens = total_tokens, 0
        self._began_s = self._line_s = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("tokens {task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("record", total=total_tokens)
            self._bar.start()

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, tokens: int) -> None:
        """So many are done, in all."""
        from megalina.track.progress import LINE_EVERY_S, duration

        now_s = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=min(tokens, self._total_tokens))
        elif now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            left_s = (now_s - self._began_s) * (self._total_tokens - tokens) / max(tokens, 1)
            print(f"tokens {tokens:,}/{self._total_tokens:,}, {duration(left_s)} left", file=sys.stderr, flush=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder: its newest checkpoint")
    parser.add_argument(
        "--data",
        default="",
        metavar="TEXT_OR_PREFIX",
        help="a text file, .jsonl or folder, tokenized with the model's tokenizer; or PREFIX of PREFIX.bin and PREFIX.idx "
        "(default: the run's validation text)",
    )
    parser.add_argument(
        "--training", type=whole(0, 1 << 53), metavar="FIRST", help="instead: the run's training sequences from this number on"
    )
    parser.add_argument(
        "--tokens", type=whole(1, MOST_TOKENS), default=16384, metavar="N", help="at most so many (default 16384)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="in which the model computes (default float32)"
    )
    parser.add_argument("--logprobs", action="store_true", help="with the log-probability of each token's successor")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to write it (default CHECKPOINT/{PROFILE})")
    parser.add_argument(
        "--devices", type=whole(1, 1 << 20), metavar="N", help=f"report the load of the busiest of so many (default {DEVICES})"
    )
    parser.add_argument("--tokenizer", default="", help="where it lies now, if not where the checkpoint says")
    parser.add_argument("--cache-dir", default="", help="where the run's prepared text lies now, if not where the run had it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (default cpu)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        print(run(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> str:
    """Records and writes; returns the summary."""
    checkpoint = checkpoint_of(options.checkpoint)
    values = read_values(checkpoint)
    out = options.out or checkpoint / PROFILE
    check(options, values, out)
    import torch

    from megalina.checkpoint.loaded_model import load_model
    from megalina.model.routing_recorder import record_routing
    from megalina.parallel.trainable import DTYPES
    from megalina.placement.routing_trace import write_trace

    with tempfile.TemporaryDirectory(prefix="megalina_record_") as folder:
        text = open_text(options, checkpoint, values, Path(folder))
        gpt = load_model(checkpoint, device=options.device, dtype=DTYPES[options.dtype]).gpt
        seq_len = values["config"]["train"]["seq_len"]
        total = min(options.tokens, text.num_sequences * seq_len)
        with Shown(total) as shown:
            trace = record_routing(
                gpt,
                (batch.to(torch.device(options.device)) for batch in batches(text, max(1, BATCH_TOKENS // seq_len))),
                max_tokens=total,
                name=f"{values['config']['model']['name']}, step {values['step']}, {text.name}",
                logprobs=options.logprobs,
                each_batch=shown.update,
            )
    write_trace(out, trace)
    return summary(trace, devices_of(options, trace.num_experts), out)


def check(options: argparse.Namespace, values: dict[str, Any], out: Path) -> None:
    """ValueError for what can be seen before the weights are read."""
    if options.training is not None and options.data:
        raise ValueError(f"--training {options.training} and --data {options.data}: give one of them")
    if options.device == "cuda":
        import torch  # seconds, which a mistake need not wait for

        if not torch.cuda.is_available():
            raise ValueError(f"--device {options.device}, but torch sees no GPU: leave it out")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.absolute().parent}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it, such as {out / PROFILE}")
    num_experts, kind = values["config"]["model"]["num_experts"], values["config"]["router"]["kind"]
    if options.devices is not None and not 1 <= options.devices <= num_experts:
        raise ValueError(f"--devices is {options.devices}: choose 1 to {num_experts}, the number of experts")
    if kind == "expert_choice":
        raise ValueError(
            f"{options.checkpoint} routes with expert_choice: experts choose tokens there, so a token has no choices to record"
        )
    if kind == "dense":
        raise ValueError(
            f"{options.checkpoint} was trained with router=dense: all experts get all tokens, so there is nothing to record; an "
            "evaluation with infer.select=top_k records what it serves with"
        )


def checkpoint_of(path: Path) -> Path:
    if not (path / "checkpoints").is_dir():
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise ValueError(f"{path} has no checkpoint yet")
    return newest


def open_text(options: argparse.Namespace, checkpoint: Path, values: dict[str, Any], folder: Path) -> Text:
    """`folder`: for a text that has yet to be tokenized.  ValueError where there is none, or it isn't of the model's ids."""
    from megalina.data.indexed import IndexedDataset
    from megalina.data.statistics import max_id
    from megalina.data.tokenizer import open_tokenizer
    from megalina.evaluate.perplexity import open_held_out

    seq_len = values["config"]["train"]["seq_len"]
    wanted = -(-options.tokens // seq_len)
    if options.training is not None:
        return training_text(values, wanted, first=options.training, cache_dir=options.cache_dir)
    if not options.data:
        held_out = open_held_out(checkpoint, num_sequences=wanted, cache_dir=options.cache_dir)
        return Text(held_out.samples, held_out.num_sequences, "validation text")
    tokenizer_path = options.tokenizer or values["tokenizer_path"]
    tokenizer = open_tokenizer(tokenizer_path) if tokenizer_path else None
    if tokenizer is not None:
        check_ids(tokenizer.vocab_size, values, tokenizer_path)
    prefix, name = options.data, Path(options.data).name
    if not Path(f"{prefix}.idx").is_file():
        if tokenizer is None:
            raise ValueError(f"{checkpoint} was trained on token ids without a tokenizer: name one with --tokenizer")
        prefix = str(folder / "text")
        tokenize(options.data, tokenizer, prefix, enough_tokens=wanted * seq_len)
    dataset = IndexedDataset(prefix)
    largest = max_id(dataset, folder)
    if largest >= values["vocab_size"]:
        raise ValueError(
            f"{prefix}.bin holds the token id {largest}, the model has {values['vocab_size']} ids: give its own data"
        )
    samples = packed(dataset, values, tokenizer, folder)
    return Text(samples, min(wanted, samples.num_sequences), name)


def training_text(values: dict[str, Any], num_sequences: int, *, first: int, cache_dir: str) -> Text:
    """What a run of these settings trains on; ValueError where it isn't the text of the model."""
    from dataclasses import replace

    from megalina.config import DataConfig
    from megalina.data.source import open_data

    train, data = values["config"]["train"], DataConfig(**values["config"]["data"])
    opened = open_data(replace(data, cache_dir=cache_dir) if cache_dir else data, seq_len=train["seq_len"], seed=train["seed"])
    if opened.vocab_size > values["vocab_size"]:
        raise ValueError(
            f"the text now has {opened.vocab_size} ids, the model {values['vocab_size']}: it isn't what it learned from"
        )
    return Text(opened.train, num_sequences, f"training text from sequence {first} on", first)


def check_ids(num_ids: int, values: dict[str, Any], tokenizer_path: str) -> None:
    words = values["vocab_size"]
    if num_ids > words or (num_ids < words and values["config"]["model"]["vocab_size"] == 0):
        raise ValueError(
            f"{tokenizer_path} has {num_ids} ids, the model {words}: give the tokenizer it was trained with as --tokenizer"
        )


def tokenize(path: str, tokenizer: "Tokenizer", prefix: str, *, enough_tokens: int) -> None:
    """The documents of a text file, which is one, of a .jsonl under "text", or of a folder: the first that are enough."""
    from megalina.data.documents import find_sources, read_texts
    from megalina.data.indexed import IndexedWriter, best_dtype
    from megalina.data.preprocess import encode_documents

    tokens = 0
    with IndexedWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer:
        for document in read_texts(find_sources([path]), ["text"]):
            encoded = encode_documents(tokenizer, [document], append_eod=True)
            writer.add_documents(encoded.tokens, encoded.lengths)
            tokens += len(encoded.tokens)
            if tokens > enough_tokens:  # one more is the last label
                break
        if tokens == 0:
            raise ValueError(f"{path} holds no text: give a file with text in it")


def packed(dataset: "IndexedDataset", values: dict[str, Any], tokenizer: "Tokenizer | None", folder: Path) -> "PackedSamples":
    """All of the dataset once, packed into sequences as the run packed its own text."""
    from megalina.config import DataConfig
    from megalina.data.gpt_dataset import GPTDataset, Span
    from megalina.data.source import PackedSamples

    train, data = values["config"]["train"], DataConfig(**values["config"]["data"])
    if dataset.num_tokens < 2:
        raise ValueError(f"{dataset.prefix}.bin holds {dataset.num_tokens} token(s): give more text")
    span = Span(0, dataset.num_documents, 0, dataset.num_tokens)
    return PackedSamples(
        [GPTDataset(dataset, span, seq_len=train["seq_len"], seed=0, repeat=False, cache_dir=folder)],
        [1.0],
        seq_len=train["seq_len"],
        eod=tokenizer.eod if tokenizer is not None else None,
        reset_positions=data.reset_positions,
        reset_attention=data.reset_attention,
        mask_eod=data.mask_eod,
        cache_dir=folder,
    )


def batches(text: Text, batch_sequences: int) -> "Iterator[Batch]":
    for done in range(0, text.num_sequences, batch_sequences):
        yield text.samples.batch(text.first + done, min(batch_sequences, text.num_sequences - done))


def devices_of(options: argparse.Namespace, num_experts: int) -> int:
    return options.devices or min(DEVICES, num_experts)


def summary(trace: "RoutingTrace", num_devices: int, out: Path) -> str:
    """One line.  Devices hold the experts in blocks, once each, as in training."""
    import numpy as np

    from megalina.placement.planners.identity import identity
    from megalina.placement.routing_trace import skew

    placement = identity(np.ones(trace.num_experts), num_devices, -(-trace.num_experts // num_devices))
    ratio_L = busiest_over_mean(trace, placement)
    worst = int(ratio_L.argmax())
    popular = f"most / least popular expert {skew(trace):.1f}x (median layer)"
    return (
        f"{trace.num_tokens:,} tokens of {len(trace.sample_lengths_S)} sequences, {trace.num_layers} MoE layers, "
        f"{trace.num_experts} experts top-{trace.top_k}; {popular}; busiest of "
        f"{num_devices} devices {np.median(ratio_L):.2f}x the mean (median layer), {ratio_L[worst]:.2f}x (layer "
        f"{trace.layers[worst]}); {out}"
    )


def busiest_over_mean(trace: "RoutingTrace", placement: "Placement") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """[L]: rows of the busiest device over the mean of devices."""
    import numpy as np

    from megalina.placement.routing_trace import counts_LE

    load_LN = np.stack([counts_LE(trace)[:, [e for e in device if e >= 0]].sum(1) for device in placement.slots], axis=1)
    return np.asarray(load_LN.max(1) / load_LN.mean(1))


if __name__ == "__main__":
    from megalina.console import command

    command(main)
