"""Compare runs: print a table of every run at or below a folder, sorted by validation loss, and draw their loss curves.

python tools/compare_runs.py FOLDER [--json FILE] [--png FILE]
"""

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Table and loss curves of all runs at or below FOLDER, best validation loss first."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a sweep's folder, or any folder of run folders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON, an object a run")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="where to draw the loss curves (default: FOLDER/compare_runs.png)"
    )
    args = parser.parse_args(argv)
    from megalina.track.comparison import curves, find_runs, rows, table

    try:
        runs = find_runs(args.folder)
        print(table(runs))
        if args.json:
            args.json.write_text(json.dumps(rows(runs), indent=1) + "\n", encoding="utf-8")
        picture = args.png or args.folder / "compare_runs.png"
        curves(runs).savefig(picture)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"loss curves: {picture}")
    return 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
