"""Bring routing that others have recorded into a file that routers replay (router.replay=FILE), and back; docs/router-twin.md.

python tools/import_routing.py vllm COMPLETIONS.jsonl --model CHECKPOINT --out replay.npz
python tools/import_routing.py vllm ROUTED.npz --model CHECKPOINT --out replay.npz    # routed_experts [B, S, L, K], tokens [B, S]
python tools/import_routing.py megatron router_trace_rank0.jsonl --tokens TOKENS.npy --model CHECKPOINT --out replay.npz
python tools/import_routing.py export replay.npz --out ROUTED.npz                     # vLLM's arrays

The model says how many experts there are and which layers have them; else --experts N [--layers 1,2,3 --all-layers N] does.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalina.arguments import Parser, new_file, whole
from megalina.placement.routed_experts import Routed, from_arrays, from_json_lines, of_layers, to_arrays
from megalina.placement.router_replay import RouterReplay
from megalina.placement.routing_trace import RoutingTrace, read_trace, write_trace
from megalina.placement.traced_text import TracedText

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARRAYS = ("routed_experts", "tokens", "lengths", "attention_mask")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    vllm = commands.add_parser("vllm", help="arrays (.npz, or .npy with --tokens) or JSON lines of completions")
    megatron = commands.add_parser("megatron", help="one rank's router_trace_rank<r>.jsonl of Megatron-Core")
    for command in (vllm, megatron):
        command.add_argument("file", type=Path)
        command.add_argument("--model", type=Path, metavar="CHECKPOINT", help="a checkpoint or run folder of the model")
        command.add_argument("--experts", type=whole(1, 1 << 20), metavar="N", help="of a layer, where there is no model here")
        command.add_argument("--layers", type=numbers, metavar="A,B", help="those with experts (default: all that the file has)")
        command.add_argument("--all-layers", type=whole(1, 1 << 20), metavar="N", help="of the model, with and without experts")
    vllm.add_argument(
        "--holes", action="store_true", help="tokens without a route (-1) may be anywhere: routers choose by themselves there"
    )
    vllm.add_argument("--tokens", type=Path, metavar="FILE", help="tokens [B, S] beside an .npy of routed_experts")
    megatron.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        required=True,
        help=".npy, integers [B, S]: the sequences in the order of the trace",
    )
    export = commands.add_parser("export", help="vLLM's arrays of a file that routers replay")
    export.add_argument("file", type=Path)
    for command in (vllm, megatron, export):
        command.add_argument("--out", type=new_file, metavar="FILE", required=True, help="where to write it")
    return parser.parse_args(argv)


def numbers(text: str) -> list[int]:
    """ "1,2,3"."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be numbers, as 1,2,3") from None


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        print(run(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> str:
    """Reads and writes; returns a line about it."""
    if options.command == "export":
        arrays = to_arrays(read_trace(options.file))
        with options.out.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        shape = " x ".join(map(str, arrays["routed_experts"].shape))
        return f"routed_experts {shape} (sequences, tokens, layers, experts a token); {options.out}"
    check_model(options)
    trace = from_vllm(options) if options.command == "vllm" else from_megatron(options)
    RouterReplay(trace)  # which refuses one sequence with two routes
    write_trace(options.out, trace)
    return (
        f"{trace.num_tokens:,} tokens of {len(trace.sample_lengths_S)} sequences, {trace.num_layers} MoE layers, "
        f"{trace.num_experts} experts top-{trace.top_k}; {options.out}"
    )


def from_vllm(options: argparse.Namespace) -> RoutingTrace:
    if options.file.suffix not in (".npz", ".npy"):
        return from_json_lines(options.file, model_of(options, None), holes=options.holes)
    found = arrays_of(options.file)
    if options.tokens:
        found["tokens"] = array_of(options.tokens)
    if missing := {"routed_experts", "tokens"} - found.keys():
        raise ValueError(f"{options.file} has no array {', '.join(sorted(missing))}: give an .npz with both, or --tokens FILE")
    routed = found["routed_experts"]
    try:
        return from_arrays(
            routed,
            found["tokens"],
            model_of(options, routed.shape[-2] if routed.ndim > 2 else 1),
            holes=options.holes,
            lengths_B=found.get("lengths"),
            mask_BS=found.get("attention_mask"),
            name=options.file.stem,
        )
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from error


def from_megatron(options: argparse.Namespace) -> RoutingTrace:
    """Megatron's routers see tokens place by place, [S, B] and not [B, S]; each record has whole sequences, in the order of
    --tokens."""
    from placement_lab.trace_import import from_megatron_jsonl

    trace = from_megatron_jsonl(options.file)
    model, token_BS = model_of(options, trace.num_layers), array_of(options.tokens)
    if token_BS.ndim != 2 or not np.issubdtype(token_BS.dtype, np.integer):
        raise ValueError(f"{options.tokens} must be integers [B, S], not {token_BS.dtype} {list(token_BS.shape)}")
    sequences, length = token_BS.shape
    uneven = [int(n) for n in trace.sample_lengths_S if n % length]
    if uneven or trace.num_tokens != sequences * length:
        raise ValueError(
            f"{options.file} has records of {trace.num_tokens} tokens, and {options.tokens} {sequences} sequences of {length}: "
            "each record must have whole sequences (with sequence parallelism a rank has a part of them), and all must be there"
        )
    ends = np.cumsum(trace.sample_lengths_S)
    batches = np.split(trace.expert_ids_TLK, ends[:-1])
    ids_TLK = np.concatenate([b.reshape(length, -1, *b.shape[1:]).swapaxes(0, 1).reshape(b.shape) for b in batches])
    ids_TLK = of_layers(ids_TLK, model, str(options.file))
    if int(ids_TLK.max()) >= model.num_experts:
        raise ValueError(
            f"{options.file} has expert {int(ids_TLK.max())}, and the model has experts 0 to {model.num_experts - 1}"
        )
    return replace(
        trace,
        expert_ids_TLK=ids_TLK,
        num_experts=model.num_experts,
        layers=model.layers,
        sample_lengths_S=np.full(sequences, length),
        text=TracedText(token_BS.reshape(-1)),
    )


def check_model(options: argparse.Namespace) -> None:
    """ValueError unless something says of which model the file is, and one thing alone."""
    if options.model is not None and (options.experts or options.layers or options.all_layers):
        raise ValueError("--model says which experts and layers there are: leave out --experts, --layers and --all-layers")
    if options.model is None and not options.experts:
        raise ValueError("how many experts a layer has is not in the file: give --model CHECKPOINT, or --experts N")


def model_of(options: argparse.Namespace, columns: int | None) -> Routed:
    """`columns`: layers that the file has, where that is known."""
    if options.model is not None:
        from megalina.checkpoint.files import read_values
        from megalina.config import ModelConfig, is_moe_layer
        from tools.record_routing import checkpoint_of

        model = ModelConfig(**read_values(checkpoint_of(options.model))["config"]["model"])
        layers = tuple(layer for layer in range(model.num_layers) if is_moe_layer(model, layer))
        return Routed(model.num_experts, layers, model.num_layers)
    layers = tuple(options.layers or range(columns or 0))
    if not layers:
        raise ValueError("which layers have experts is not known before JSON lines are read: give --layers or --model")
    most = options.all_layers or max(layers) + 1
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= most:
        raise ValueError(f"--layers {','.join(map(str, layers))} must be rising numbers from 0 to {most - 1}")
    return Routed(options.experts, layers, most)


def arrays_of(path: Path) -> "dict[str, NDArray[Any]]":
    """Those of an .npz that are known; of an .npy its one, as routed_experts."""
    if path.suffix == ".npy":
        return {"routed_experts": array_of(path)}
    try:
        with np.load(path, allow_pickle=False) as found:
            return {key: found[key] for key in ARRAYS if key in found.files}
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # of zip, zlib and numpy, which have many kinds
        raise ValueError(f"{path} is no .npz, or damaged: {error}") from error


def array_of(path: Path) -> "NDArray[Any]":
    try:
        found: NDArray[Any] = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy, or damaged: {error}") from error
    return found


if __name__ == "__main__":
    from megalina.console import command

    command(main)
