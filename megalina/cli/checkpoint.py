"""Look into checkpoints, verify, convert and average them, and take models from Hugging Face's format and back, on one process
and with one tensor in memory at a time.

python tools/checkpoint.py inspect RUN [--json]                            # a run folder: its newest checkpoint
python tools/checkpoint.py verify RUN                                      # all its checkpoints; exit code 1 if one is damaged
python tools/checkpoint.py convert RUN model.safetensors [--optimizer]     # weights by the names of GPT's parameters
python tools/checkpoint.py convert model.safetensors FOLDER                # back to a checkpoint, for train.init_from
python tools/checkpoint.py convert RUN FOLDER --ranks 8                    # the same checkpoint in 8 tensor files
python tools/checkpoint.py average STEP_A STEP_B --out FOLDER              # the mean of the weights
python tools/checkpoint.py import HF_FOLDER CHECKPOINT                     # from Hugging Face's format
python tools/checkpoint.py export RUN HF_FOLDER                            # to it
python tools/checkpoint.py prove HF_FOLDER                                 # the import against transformers, and back
python tools/checkpoint.py upcycle DENSE CHECKPOINT model.num_experts=8    # experts from a dense model's MLPs
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalina.arguments import Parser, number, whole
from megalina.checkpoint.checksums import METADATA, SUMS, VALUES
from megalina.checkpoint.files import is_complete, newest_first
from megalina.config import ModelConfig, RouterConfig

SAFETENSORS = ".safetensors"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    place = "a checkpoint folder, or a run folder"

    inspect = commands.add_parser("inspect", help="what is in a checkpoint; no tensor is read")
    inspect.add_argument("paths", type=Path, nargs="+", metavar="PATH", help=f"{place}: its newest checkpoint")
    inspect.add_argument("--json", action="store_true", help="one JSON object a checkpoint and line")

    verify = commands.add_parser(
        "verify",
        help="checksums of all files, every tensor whole, all values finite",
        description="Exit code 0: all is well; 1: not so, each damaged file or tensor on a line; 2: there is no checkpoint.",
    )
    verify.add_argument("paths", type=Path, nargs="+", metavar="PATH", help=f"{place}: all its checkpoints")

    convert = commands.add_parser(
        "convert",
        help="to a .safetensors file, from one, or into another number of tensor files",
        description="Of SOURCE and TARGET the one that ends in .safetensors is a file of weights, the other one a checkpoint. "
        "Nothing is rounded: there and back again is equal to the last bit.",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help=f"{place} (its newest checkpoint), or a .safetensors file")
    convert.add_argument("target", type=Path, metavar="TARGET", help="a .safetensors file or a folder, which is not there yet")
    convert.add_argument(
        "--optimizer", action="store_true", help="to .safetensors: optimizer state too, as exp_avg/NAME and so on"
    )
    convert.add_argument(
        "--ranks",
        type=whole(1),
        metavar="N",
        help="write N tensor files of even size, as N ranks would.  Checkpoints know no layout, any layout loads any: "
        "this evens out file sizes, for disks and readers that work on files in parallel (default 1)",
    )

    mean = commands.add_parser(
        "average", help="the mean of the weights of several checkpoints of a model, for train.init_from and tools/generate.py"
    )
    mean.add_argument("paths", type=Path, nargs="+", metavar="PATH", help=f"{place}: its newest checkpoint")
    mean.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the checkpoint to write; not there yet")
    mean.add_argument("--weights", metavar="W,W,...", help="of each PATH, in order; they sum to 1 (default: equal)")

    take = commands.add_parser("import", help="a checkpoint from a folder in Hugging Face's format")
    take.add_argument("source", type=Path, metavar="HF_FOLDER", help="config.json, safetensors files, tokenizer files")
    take.add_argument("target", type=Path, metavar="CHECKPOINT", help="the checkpoint to write; not there yet")

    give = commands.add_parser("export", help="a folder in Hugging Face's format from a checkpoint")
    give.add_argument("source", type=Path, metavar="CHECKPOINT", help=f"{place}: its newest checkpoint")
    give.add_argument("target", type=Path, metavar="HF_FOLDER", help="the folder to write; not there yet")
    give.add_argument(
        "--family", default="", help="mixtral, say (default: the one it came from, that of --like, or the first that fits)"
    )
    give.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="a Hugging Face folder, or an imported checkpoint: its tokenizer files go along, and the fields of its config.json "
        "that change no logit (default: what CHECKPOINT carries)",
    )
    give.add_argument("--shard-gb", type=number(0, 1e6, above=True), default=5.0, help="largest safetensors file (default 5)")

    proof = commands.add_parser(
        "prove",
        help="an import against transformers: logits, loss, gradients, router choices, and the way back",
        description="Exit code 0: all is within its bar; 1: not so; 2: it can't be told.  Needs transformers "
        "(pip install 'megalina[hf]') and memory for two models in float32 with gradients.",
    )
    proof.add_argument("source", type=Path, metavar="HF_FOLDER", help="config.json and safetensors files")
    proof.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    proof.add_argument("--scratch", type=Path, metavar="FOLDER", help="where both forms are written for a while (default: /tmp)")

    grow = commands.add_parser("upcycle", help="a mixture of experts from a dense checkpoint: experts are copies of its MLPs")
    grow.add_argument("source", type=Path, metavar="DENSE", help=f"{place}: its newest checkpoint")
    grow.add_argument("target", type=Path, metavar="CHECKPOINT", help="the checkpoint to write; not there yet")
    grow.add_argument(
        "overrides", nargs="+", metavar="model.KEY=VALUE", help="model.num_experts=8, and other settings of model and router"
    )
    grow.add_argument(
        "--noise",
        type=number(0, 1e6),
        default=0.0,
        help="experts' numbers are multiplied by 1 + noise x a normal one, and routers get noise x init_std x normal ones "
        "(default 0: the first loss is the dense model's)",
    )
    grow.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of the noise (default 0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        if options.command == "verify":
            return verify([path for given in options.paths for path in all_of(given)])
        if options.command == "inspect":
            paths = list(map(newest_of, options.paths))
            from megalina.checkpoint.inspection import as_text, summary  # torch, which a mistake need not wait for

            for path in paths:
                found = summary(path)
                print(json.dumps(found) if options.json else as_text(found))
        elif options.command == "average":
            weights = None if options.weights is None else [float(w) for w in options.weights.split(",")]
            paths = [newest_of(path) for path in options.paths]
            from megalina.checkpoint.average import average

            average(paths, options.out, weights=weights)
            print(f"{options.out}: the mean of {len(options.paths)} checkpoints")
        elif options.command == "import":
            take(options.source, options.target)
        elif options.command == "export":
            give(options)
        elif options.command == "prove":
            return prove(options)
        elif options.command == "upcycle":
            grow(options)
        else:
            convert(options.source, options.target, optimizer=options.optimizer, ranks=options.ranks)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def verify(paths: list[Path]) -> int:
    from megalina.checkpoint.inspection import faults

    damaged = 0
    for path in paths:
        found = faults(path)
        damaged += bool(found)
        print("\n".join(found) if found else f"{path}: all files and tensors are as they should be")
    return 1 if damaged else 0


def convert(source: Path, target: Path, *, optimizer: bool, ranks: int | None) -> None:
    to_file, from_file = (path.suffix == SAFETENSORS for path in (target, source))
    if to_file and from_file:
        raise ValueError(f"{source} and {target} are both {SAFETENSORS}: one of them must be a checkpoint folder")
    if optimizer and not to_file:
        raise ValueError(f"--optimizer is for the way to a {SAFETENSORS} file; on the way back all of the file is taken")
    if ranks is not None and to_file:
        raise ValueError(f"--ranks is for checkpoint folders; {target} is one file")
    if to_file:
        there = newest_of(source)
        from megalina.checkpoint.safetensors_file import to_safetensors

        to_safetensors(there, target, optimizer=optimizer)
    elif from_file:
        from megalina.checkpoint.safetensors_file import from_safetensors

        from_safetensors(source, target, files=1 if ranks is None else ranks)
    elif ranks is None:
        raise ValueError(f"from folder to folder there is nothing to convert without --ranks; or name TARGET *{SAFETENSORS}")
    else:
        there = newest_of(source)
        from megalina.checkpoint.streaming_writer import rewrite

        rewrite(there, target, files=ranks)
    print(target)


def take(source: Path, target: Path) -> None:
    from megalina.checkpoint.hugging_face.carried import REPORT
    from megalina.checkpoint.hugging_face.importing import import_folder

    done = import_folder(source, target)
    size = f"{done.parameters:,} parameters from {done.keys:,} tensors, {done.num_bytes / 1e9:,.2f} GB"
    print(f"{target}: {done.family}, {size}; SHA-256 of {len(done.experts):,} experts in {REPORT}")
    if done.ignored:
        more = " ..." if len(done.ignored) > 3 else ""
        print(f"left out, since nothing in them is learned: {', '.join(done.ignored[:3])}{more}")
    _say(done.notes)
    print(f"train on it: python pretrain_gpt_moe.py train.init_from={target} {' '.join(done.overrides)}")


def give(options: argparse.Namespace) -> None:
    there = newest_of(options.source)
    from megalina.checkpoint.hugging_face.exporting import export_checkpoint

    done = export_checkpoint(
        there, options.target, family=options.family, like=options.like, shard_bytes=round(options.shard_gb * 1e9)
    )
    size = f"{done.keys:,} tensors in {done.shards} safetensors files, {done.num_bytes / 1e9:,.2f} GB"
    print(f"{options.target}: {done.family}, {size}")
    _say(done.notes)


def prove(options: argparse.Namespace) -> int:
    from megalina.checkpoint.hugging_face.peer import check_installed

    check_installed()
    from megalina.checkpoint.hugging_face.proof import prove

    proof = prove(options.source, scratch=options.scratch)
    print(f"{options.source}: {proof.family}, against transformers in float32")
    print(proof.table())
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(proof), indent=1) + "\n")
    return 0 if proof.holds else 1


def grow(options: argparse.Namespace) -> None:
    given: dict[str, dict[str, str]] = {"model": {}, "router": {}}
    for text in options.overrides:
        name, equals, value = text.partition("=")
        group, dot, key = name.partition(".")
        if not (equals and dot and group in given):
            raise ValueError(f"{text} must be model.KEY=VALUE or router.KEY=VALUE, such as model.num_experts=8")
        given[group][key] = value
    there = newest_of(options.source)
    from megalina.checkpoint.hugging_face.linked import overrides
    from megalina.checkpoint.upcycling import upcycle

    after = upcycle(
        there,
        options.target,
        model=typed(ModelConfig, "model", given["model"]),
        router=typed(RouterConfig, "router", given["router"]),
        noise=options.noise,
        seed=options.seed,
    )
    print(f"{options.target}: {after.model.num_experts} experts in {sum(after.moe)} of {len(after.moe)} layers")
    print(f"train on it: python pretrain_gpt_moe.py train.init_from={options.target} {' '.join(overrides(after))}")


def typed(schema: type, group: str, words: Mapping[str, str]) -> dict[str, Any]:
    """The values of settings as they were typed; ValueError for a key that isn't there, or a value of another type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found: dict[str, Any] = {}
    for key, word in words.items():
        try:
            whole = OmegaConf.to_container(
                OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist([f"{key}={word}"]))
            )
        except OmegaConfBaseException as error:
            raise ValueError(f"{group}.{key}={word}: {str(error).splitlines()[0]}") from error
        assert isinstance(whole, dict)
        found[key] = whole[key]
    return found


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}")


def all_of(path: Path) -> list[Path]:
    """The checkpoints of a run folder, or the one that `path` is."""
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}: give the folder of one, or of a run")
    if not (path / "checkpoints").is_dir():
        if not any((path / name).exists() for name in (VALUES, METADATA, SUMS)):
            raise ValueError(f"{path} is neither a checkpoint nor a run folder: it has no {VALUES} and no checkpoints/")
        return [path]
    found = newest_first(path / "checkpoints")
    if not found:
        raise ValueError(f"{path} has no checkpoint yet")
    return found


def newest_of(path: Path) -> Path:
    found = all_of(path)
    complete = [one for one in found if is_complete(one)]
    return complete[0] if complete else found[0]  # what reads it says what it lacks


if __name__ == "__main__":
    from megalina.console import command

    command(main)
