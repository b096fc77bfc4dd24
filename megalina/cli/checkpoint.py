"""Look into checkpoints, verify, convert and average them, on one process and with one tensor in memory at a time.

python tools/checkpoint.py inspect RUN [--json]                            # a run folder: its newest checkpoint
python tools/checkpoint.py verify RUN                                      # all its checkpoints; exit code 1 if one is damaged
python tools/checkpoint.py convert RUN model.safetensors [--optimizer]     # weights by the names of GPT's parameters
python tools/checkpoint.py convert model.safetensors FOLDER                # back to a checkpoint, for train.init_from
python tools/checkpoint.py convert RUN FOLDER --ranks 8                    # the same checkpoint in 8 tensor files
python tools/checkpoint.py average STEP_A STEP_B --out FOLDER              # the mean of the weights
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megalina.arguments import Parser, whole
from megalina.checkpoint.checksums import METADATA, SUMS, VALUES
from megalina.checkpoint.files import is_complete, newest_first

SAFETENSORS = ".safetensors"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect|verify|convert|average")
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
