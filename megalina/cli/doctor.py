"""Is this machine ready to train?  Looks at Python, packages, GPUs, ranks, disk, W&B, and says what to do.

python tools/doctor.py                  all of it, in some seconds; exit code 1 if something that every run needs is missing
python tools/doctor.py --ranks 8        start so many ranks on this machine and let them sum
python tools/doctor.py --json FILE      the same for programs
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megalina.arguments import Parser, new_file, whole
from megalina.readiness import FOLDER, Level, findings


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=whole(0), default=2, metavar="N", help="ranks to start; 0: none (default: 2)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where runs will be written (default: runs)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write what was found")
    args = parser.parse_args(argv)
    found = findings(ranks=args.ranks, folder=args.folder)
    print("\n".join(map(str, found)))
    bad = [finding for finding in found if finding.level is Level.BAD]
    print("\nnot ready: " + ", ".join(f.about for f in bad) if bad else "\nready: python pretrain_gpt_moe.py experiment=laptop")
    if args.json:
        args.json.write_text(json.dumps({"ready": not bad, "findings": list(map(asdict, found))}, indent=1) + "\n")
    return 1 if bad else 0
