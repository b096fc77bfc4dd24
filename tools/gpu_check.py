"""Check a machine's GPU in at most nine minutes: every CUDA path against float64 on the CPU, then checkpoints, generation,
serving, steps against forecasts, speed and memory, and what a host spends on a step.

    python tools/gpu_check.py                        the same as: make gpu-check; without a GPU what can run on a CPU
    python tools/gpu_check.py --only experts,star    some parts

Each part is a process of its own with a time limit and a log, OUT/PART.log.  OUT/gpu_check.json has all numbers,
OUT/gpu_check.md is the page, with the last lines of the log of every part that failed.  It needs this checkout, torch, numpy and
what `tools/gpu_kit.py` packs, and no network; W&B, tensorboard and matplotlib may be absent.  Exit code 1: a part failed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from megalina.arguments import Parser, number
from megalina.console import command

SECONDS = 520.0  # of all parts; starting and writing take the rest of nine minutes


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="FOLDER", help="default: gpu-check")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="default: a GPU if there is one")  # fmt: skip
    parser.add_argument("--only", default="", metavar="A,B", help="parts by name (default: all)")
    parser.add_argument("--seconds", type=number(0, 1e6, above=True), default=SECONDS, metavar="S",
                        help=f"of all parts together (default: {SECONDS:.0f})")  # fmt: skip
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # in the process of a part
    args = parser.parse_args(argv)
    import torch

    from megalina.gpu_check.check import check
    from megalina.gpu_check.parts import PARTS

    by_name = {part.name: part for part in PARTS}
    if args.part:
        look = by_name[args.part].look
        assert look is not None, f"{args.part} is a command"
        found = look(args.device, args.out)
        (args.out / f"{args.part}.json").write_text(json.dumps(asdict(found)))
        return 0
    names = args.only.split(",") if args.only else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"--only {','.join(unknown)}: choose among {', '.join(by_name)}")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: leave --device out to run what can on a CPU, or install a CUDA build of torch")
    if device == "cpu" != args.device:
        print("torch sees no GPU here: this checks what can run on a CPU")
    return check([by_name[name] for name in names], device, args.out, args.seconds)


if __name__ == "__main__":
    command(main)
