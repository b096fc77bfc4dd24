"""Compare routing: where does a trainer choose other experts than a server did, what does it cost, and what does replay close?

python tools/compare_routing.py CHECKPOINT server.npz                    # the trainer in float32, the server by its file
python tools/compare_routing.py CHECKPOINT server.npz --server-dtype bfloat16 --json twin.json --png twin.png   # its model, too

The file is one that tools/record_routing.py or import_routing.py writes.  With --server-dtype (and --server CHECKPOINT, where it
is another model) the server's model runs here too, and distributions are compared.  docs/router-twin.md says what they mean.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megalina.arguments import Parser, new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megalina.evaluate.router_twin import Comparison, Prediction

TYPES = ("float32", "bfloat16", "float64")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the trainer: a checkpoint folder, or a run folder: its newest checkpoint")
    parser.add_argument("routing", type=Path, metavar="FILE", help="what the server has chosen, with its tokens")
    parser.add_argument("--dtype", default="float32", choices=TYPES, help="of the trainer (default float32)")
    parser.add_argument("--server", type=Path, metavar="CHECKPOINT", help="the server's model (default: the trainer's)")
    parser.add_argument("--server-dtype", choices=TYPES, help="the server's model runs too, in this type")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (default cpu)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers")
    parser.add_argument("--png", type=new_file, metavar="FILE", help="draw the share of tokens that differ, layer by layer")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        found = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    if options.png:
        picture(found).savefig(options.png)
    return 0


def run(options: argparse.Namespace) -> "Comparison":
    if options.server is not None and options.server_dtype is None:
        raise ValueError(f"--server {options.server} runs in a type: give --server-dtype")
    from tools.record_routing import checkpoint_of

    checkpoint = checkpoint_of(options.checkpoint)
    from megalina.checkpoint.files import read_values
    from megalina.placement.routing_trace import read_trace

    read_values(checkpoint)
    trace = read_trace(options.routing)
    import torch

    from megalina.checkpoint.loaded_model import load_model
    from megalina.evaluate.router_twin import compare
    from megalina.parallel.trainable import DTYPES

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU: leave it out")
    trainer = load_model(checkpoint, device=options.device, dtype=DTYPES[options.dtype]).gpt
    server = None
    if options.server_dtype is not None:
        folder = checkpoint_of(options.server) if options.server is not None else checkpoint
        server = load_model(folder, device=options.device, dtype=DTYPES[options.server_dtype]).gpt
    return compare(trainer, trace, server=server)


def table(found: "Comparison") -> str:
    """For people."""
    lines = [
        f"{found.num_tokens:,} tokens of {found.num_sequences} sequences, {len(found.layers)} MoE layers"
        + (f"; the server's choices are known of {found.num_routed:,}" if found.num_routed < found.num_tokens else ""),
        "",
        "layer  tokens with other experts  other choices  under replay  router KL  under replay",
    ]
    lines += [
        f"{layer.layer:>5}  {layer.tokens:>25.2%}  {layer.choices:>13.2%}  {layer.tokens_replayed:>12.2%}  "
        f"{_number(layer.divergence):>9}  {_number(layer.divergence_replayed):>12}"
        for layer in found.layers
    ]
    lines += [
        "",
        f"of all (token, layer) {found.tokens:.2%} have other experts; {found.tokens_in_some_layer:.2%} of tokens in some layer",
        "",
        f"{'trainer':<34}{'as it chooses':>14}{'replayed':>14}",
    ]
    rows: tuple[tuple[str, str], ...] = (
        ("loss, nats a token", "loss"),
        ("|log p - server's|, mean", "logprob_mean"),
        ("|log p - server's|, largest", "logprob_max"),
        ("KL(server || trainer), next token", "divergence"),
    )
    lines += [f"{text:<34}{_of(found.own, name):>14}{_of(found.replayed, name):>14}" for text, name in rows]
    if found.server_loss is not None:
        lines.append(f"{'loss of the server':<34}{_number(found.server_loss):>14}")
    if found.server_tokens is not None:
        lines.append(
            f"the server's model, read here, has other experts than its file in {found.server_tokens:.2%} of (token, layer)"
        )
    return "\n".join(lines)


def picture(found: "Comparison") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    places = range(len(found.layers))
    for shift, name, colour, label in (
        (-0.2, "tokens", "C0", "as it chooses"),
        (0.2, "tokens_replayed", "C1", "its own choice, layers before replayed"),
    ):
        shares = [100 * getattr(layer, name) for layer in found.layers]
        axes.bar([place + shift for place in places], shares, width=0.4, color=colour, label=label)
    axes.set_xticks(list(places), [str(layer.layer) for layer in found.layers])
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("tokens with other experts, %")
    axes.set_title(f"trainer against server: {found.tokens:.1%} of (token, layer) differ", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return figure


def _of(of: "Prediction", name: str) -> str:
    return _number(getattr(of, name))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.5f}"


if __name__ == "__main__":
    from megalina.console import command

    command(main)
