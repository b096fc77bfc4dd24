"""Is the simulator right?  Steps on the emulated cluster, measured, against the same lists in virtual time.

    sudo python benchmarks/validate_simulator.py --json FILE --plot PNG     (half an hour on an idle machine; root, iproute2)
    python benchmarks/validate_simulator.py --measured FILE                 (fit and errors again, from what was measured)
    python benchmarks/validate_simulator.py --measured LADDER.json          (what compare_strategies.py --suite ladder wrote)

Nodes, links and devices are emulated (docs/cluster.md); trainer, math, sockets and losses are real.  A configuration is a
topology, a link rate, a model and a strategy.  A hash of its name says if the constants of hosts and links may be fitted on it or
if it is held out (benchmarks/validation/cases.py); errors that count are those of the held-out ones.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent

if TYPE_CHECKING:
    from benchmarks.validation.cases import Case, Row
    from megalina.cli.compare import Job
    from megalina.config import PretrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from megalina.cli.compare import exit_code

    return exit_code(lambda: validate(args))


def validate(args: argparse.Namespace) -> None:
    from benchmarks.validation.cases import rows_of
    from benchmarks.validation.explained import explained
    from benchmarks.validation.fit import errors, fit, simulated
    from benchmarks.validation.report import draw, table

    measured = (
        results(args.measured, "settings", "this benchmark or tools/compare_strategies.py") if args.measured else measure(args)
    )
    rows = rows_of(measured)
    configs = configs_of(rows)
    fitted, held_out = ([r for r in rows if r.held_out == side] for side in (False, True))
    if not fitted or not held_out:
        raise ValueError(f"{len(fitted)} configurations to fit and {len(held_out)} held out: that is nothing to judge by")
    print(f"{len(fitted)} configurations to fit, {len(held_out)} held out", file=sys.stderr)
    host = fit(fitted, configs)
    found = {row.name: simulated(row, configs[row.name], host) for row in rows}
    result = {"host": asdict(host), "fitted": errors(fitted, found), "heldout": errors(held_out, found)}
    print("\n\n".join(filter(None, (table(rows, found, result), explained(rows, configs, host)))))
    if args.plot:
        draw(args.plot, rows, found, result)
    if args.json:
        own = {name: asdict(s) for name, s in found.items()}
        args.json.write_text(json.dumps(measured | result | {"simulated": own}, indent=1, allow_nan=False) + "\n")


def results(path: Path, key: str, writer: str) -> dict[str, Any]:
    """What `writer` wrote with --json.  ValueError for what has no such key."""
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(result, dict) or key not in result:
        raise ValueError(f"{path} has no {key}: give what {writer} wrote with --json")
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every case's interleaved runs, one case after another, each on a cluster of its own."""
    from benchmarks.validation.cases import CASES
    from megalina.cli.compare import note, run
    from megalina.namespaces import check_host

    check_host()
    jobs = [job_of_case(case) for case in CASES]
    spec = argparse.Namespace(rounds=args.rounds, steps=args.steps, picture=None, trace=None)
    found: dict[str, Any] = {"settings": [], "note": note(jobs[0])}
    with tempfile.TemporaryDirectory(prefix="megalina_validate_") as folder:
        for job in jobs:
            found["settings"].append(run(job, spec, Path(folder), first=False, to_the_end=tuple(job.configs)))
            if args.json:  # what was measured so far outlives whatever goes wrong; --measured takes it
                args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def job_of_case(case: "Case", variants: "Mapping[str, Sequence[str]] | None" = None) -> "Job":
    """`variants`: None: all of the suite."""
    from megalina.cli.compare import job_of

    variants = case.variants if variants is None else variants
    base = case.setting.all_overrides()
    return job_of(case.setting, ("eager", *variants), variants=variants, base=base, link_mbit=case.link_mbit)


def configs_of(rows: "Sequence[Row]") -> "dict[str, PretrainConfig]":
    """What each ran, by the row's name, but for its plan."""
    from megalina.compare.interleaved import is_variant

    found = {}
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        variants = {row.strategy: case.overrides(row.strategy) for row in own if not is_variant(row.strategy, "eager")}
        job = job_of_case(case, variants)
        found |= {row.name: job.configs[row.strategy] for row in own}
    return found


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, metavar="FILE", help="don't measure: take what was written with --json")
    parser.add_argument("--rounds", type=whole(1), default=3, metavar="N", help="turns of each strategy (default: 3)")
    parser.add_argument(
        "--steps", type=whole(1), default=2, metavar="N", help="timed steps a turn, after one that isn't (default: 2)"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all that was measured, the constants, the errors")
    parser.add_argument("--plot", type=new_file, metavar="PNG", help="simulated against measured")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # tools, pretrain_gpt_moe.py
    from megalina.console import command

    command(main)
