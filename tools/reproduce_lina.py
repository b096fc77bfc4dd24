"""Re-enact the Lina paper (USENIX ATC 2023): each number that it reports, beside the one that is simulated here.

    python tools/reproduce_lina.py
    python tools/reproduce_lina.py --json reproduction.json --picture reproduction.png
    python tools/reproduce_lina.py --traces summary.npz translation.npz      routing at inference from real traces

Seven constants are fitted on fifteen of the paper's numbers, all others are held out.  Steps are the trainer's own lists,
walked in virtual time on conf/cluster/lina_testbed.yaml; batches are served by the engine's own predictors and planners.  Nothing
runs on a GPU, and nothing is tuned to a held-out row.  About a minute; see docs/reproduction.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

BAD_INPUT = 2  # exit code
BASE = ("model=lina_12l_4e", "cluster=lina_testbed")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return reproduce(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT


def reproduce(args: argparse.Namespace) -> int:
    from megalina.compose import CONF, compose
    from megalina.console import StatusLine
    from megalina.serve.modes import read_mode
    from papers.lina.reenactment import reenact
    from papers.lina.report import closing, constants_table, contradictions, draw, table, what_if

    for path in filter(None, (args.json, args.picture)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    base, modes = compose(BASE), CONF / "infer"
    status = StatusLine()
    found = reenact(
        base,
        lina=read_mode(modes, "lina_paper"),
        static=read_mode(modes, "static"),
        traces=args.traces or (),
        progress=status.show,
    )
    status.end()
    hardware = base.cluster.hardware
    print(
        constants_table(
            found.constants,
            hardware.domain_gbyte_s * hardware.collective_efficiency,
            base.cluster.link_gbit / 8 * hardware.collective_efficiency,
        )
    )
    print(f"\n{table(found.rows)}\n\n{closing(found)}\n\n{what_if(found)}\n\n{contradictions(found.rows)}")
    if args.json:
        args.json.write_text(json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n")
    if args.picture:
        draw(args.picture, found.rows)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, nargs=2, metavar=("TXL", "BERT"), help="npz files of routing, see docs/inference.md; default: made"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, constants and residuals")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="simulated over the paper's, row by row")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
