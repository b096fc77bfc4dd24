"""Write a run's report.html again, from its run folder (also of a run that was killed, or is still going).

python tools/write_report.py RUN_DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write RUN_DIR/report.html again from metrics.jsonl and config.yaml.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    args = parser.parse_args(argv)
    from megalina.track.report import rebuild_report

    try:
        print(rebuild_report(args.run_dir))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
