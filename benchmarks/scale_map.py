"""The scale map: on how many GPUs, over which links, does which schedule pay?  Simulated, in one process, without a GPU.

    python benchmarks/scale_map.py --json scale-map.json --picture scale-map.png    all of it, 9 minutes
    python benchmarks/scale_map.py --quick                                          fewer points, some 3 minutes
    python benchmarks/scale_map.py --redraw scale-map.json --picture scale-map.png  from a file that was made before
    python benchmarks/scale_map.py --pipelines --json pipelines.json                pipelines and accumulation: a map of its own
    python benchmarks/scale_map.py --dispatches --json dispatches.json              parallel.dispatch: a map of its own

Each point is one layout on one cluster under every rung of benchmarks/scale/rungs.py, all with their best numbers.  Then a part
of the map is walked again with other constants.  What is assumed: docs/when-does-scheduling-pay.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
BAD_INPUT = 2  # exit code

if TYPE_CHECKING:
    from benchmarks.scale.grid import Place, Variant


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        result = whole(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    from benchmarks.scale.dispatches import dispatch_table
    from benchmarks.scale.figure import draw
    from benchmarks.scale.pipelines import piped_table
    from benchmarks.scale.report import report

    tables = {"pipelines": piped_table, "dispatches": dispatch_table}
    own = next((name for name in tables if name in result), None)
    print(tables[own](result[own]) if own else report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.picture:
        draw(args.picture, result)
    return 0


def whole(args: argparse.Namespace) -> dict[str, Any]:
    """ValueError for a file that isn't one of ours, or a folder that isn't there; for a picture of pipelines, which have none."""
    for name in ("pipelines", "dispatches"):
        if getattr(args, name) and (args.picture or args.redraw):
            raise ValueError(f"--{name} has a table alone: leave out --picture and --redraw")
    if args.pipelines and args.dispatches:
        raise ValueError("--pipelines and --dispatches are two maps: leave out one")
    for path in filter(None, (args.json, args.picture)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    if args.redraw:
        try:
            found = json.loads(args.redraw.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{args.redraw} is no JSON ({error}): give what --json has written") from error
        if not isinstance(found, dict) or not {"points", "varied"} <= found.keys():
            raise ValueError(f"{args.redraw} has no points: give what --json has written")
        return found
    if args.dispatches:
        return dispatched(quick=args.quick)
    return piped(quick=args.quick) if args.pipelines else swept(quick=args.quick)


def piped(*, quick: bool) -> dict[str, Any]:
    """Every point of pipelines and accumulation."""
    from benchmarks.scale.pipelines import piped_places, simulated
    from megalina.console import StatusLine

    status, out, places = StatusLine(), [], piped_places(quick=quick)
    for number, place in enumerate(places):
        status.show(f"{number}/{len(places)} points: {place.title}")
        out.append(simulated(place))
    status.end()
    return {"quick": quick, "pipelines": out}


def dispatched(*, quick: bool) -> dict[str, Any]:
    """Every point of dispatches."""
    from benchmarks.scale.dispatches import dispatch_places, simulated
    from megalina.console import StatusLine

    status, out, places = StatusLine(), [], list(dispatch_places(quick=quick))
    for number, place in enumerate(places):
        status.show(f"{number}/{len(places)} points: {place.title}")
        out.append(simulated(place))
    status.end()
    return {"quick": quick, "dispatches": out}


def swept(*, quick: bool) -> dict[str, Any]:
    """Every point, then those with other constants."""
    from benchmarks.scale.grid import Variant, places, varied

    assumed = Variant()
    jobs = [(assumed, place) for place in places(quick=quick)]
    others = list(varied(quick=quick))
    points = _run([*jobs, *others])
    return {"quick": quick, "points": points[: len(jobs)], "varied": points[len(jobs) :]}


def _run(jobs: "Sequence[tuple[Variant, Place]]") -> list[dict[str, Any]]:
    from benchmarks.scale.grid import simulated
    from megalina.console import StatusLine

    status = StatusLine()
    whole_cost, done_cost, started_s, out = sum(_cost(p) for _, p in jobs), 0.0, time.monotonic(), []
    for number, (variant, place) in enumerate(jobs):
        left_s = (time.monotonic() - started_s) * (whole_cost / done_cost - 1) if done_cost else 0.0
        ahead = f", {left_s / 60:.0f} min left" if done_cost else ""
        status.show(f"{number}/{len(jobs)} points{ahead}: {place.title}")
        out.append({"variant": variant.title, **place.as_json(), **simulated(place, variant).as_json()})
        done_cost += _cost(place)
    status.end()
    return out


def _cost(place: "Place") -> float:
    """In points of few GPUs: what folding takes grows with them."""
    return 1.0 + place.gpus / 200


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every point with all its rungs")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the map")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--pipelines", action="store_true", help="published models on 64 to 4,096 GPUs with 1, 4, 16 stages")
    parser.add_argument(
        "--dispatches", action="store_true", help="how tokens are sent: by row, once per GPU, once per domain, 64 to 4,096 GPUs"
    )
    parser.add_argument(
        "--redraw", type=Path, metavar="FILE", help="simulate nothing: tables and picture of what --json has written"
    )
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from megalina.console import command

    command(main)
