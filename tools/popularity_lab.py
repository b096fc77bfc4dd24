"""Popularity lab: predictors, planners, splits and triggers replayed on recorded routing.  No weights are needed.

python tools/popularity_lab.py --train A.npz --serve B.npz [--alternate] [--optimum] [--json FILE] [--plot PNG]
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalina.cli.compare import ROOT
from megalina.compose import CONF

if TYPE_CHECKING:
    from placement_lab.input import Asked

MODES = CONF / "infer"
BAD_INPUT = 2  # exit code
PICTURES = (".png", ".svg")


def main(argv: list[str] | None = None) -> int:
    from placement_lab.input import lab_of, modes_of, names_of, replayable
    from placement_lab.replays import results
    from placement_lab.report import report

    args = _parser().parse_args(argv)
    try:
        check_files(args)
        asked_names = names_of(args.predictors)
        lab = lab_of(asked_of(args))
        names, skipped_predictors = replayable(asked_names, lab, all_asked=not args.predictors)
        modes, skipped_modes = modes_of(MODES, lab)
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return BAD_INPUT
    with _Progress() as progress:
        result = results(
            lab,
            names,
            modes,
            skipped_predictors=skipped_predictors,
            skipped_modes=skipped_modes,
            seed=args.seed,
            with_optimum=args.optimum,
            progress=progress.update,
        )
    print(report(result))
    return write(result, args)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).splitlines()[0]


def asked_of(args: argparse.Namespace) -> "Asked":
    from placement_lab.input import Asked

    return Asked(**{field.name: getattr(args, field.name) for field in fields(Asked)})


def check_files(args: argparse.Namespace) -> None:
    """ValueError for a file that could not be written at the end, or a solver that is not there."""
    for flag, endings in (("json", ()), ("plot", PICTURES)):
        path: Path | None = getattr(args, flag)
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no folder {path.absolute().parent}")
        if path.is_dir():
            raise ValueError(f"--{flag} {path} is a folder: name a file")
        if endings and not path.name.endswith(endings):
            raise ValueError(f"--{flag} {path}: the name must end in {' or '.join(endings)}")
    if args.optimum and find_spec("scipy") is None:
        raise ValueError("--optimum needs scipy, which is not installed: pip install 'megalina[dev]'")


def write(result: Mapping[str, Any], args: argparse.Namespace) -> int:
    """The files that are asked for: each as a whole, or as it was before."""
    from megalina.whole_file import whole

    writers: list[tuple[Path, Callable[[Path], object]]] = []
    if args.json:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        writers.append((args.json, lambda path: path.write_text(text)))
    if args.plot:
        from placement_lab.report import draw

        writers.append((args.plot, lambda path: draw(path, result)))
    try:
        with ExitStack() as both_or_none:
            for path, write_to in writers:
                write_to(both_or_none.enter_context(whole(path)))
    except OSError as error:
        print(one_line(error), file=sys.stderr)
        return BAD_INPUT
    return 0


class _Progress:
    """How far it is, on stderr: a live bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._live = sys.stderr.isatty()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
            console=Console(file=sys.stderr),
            redirect_stdout=False,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("replays", total=None, what="")

    def update(self, before: int, total: int, what: str) -> None:
        """One more begins."""
        self._bar.update(self._task, completed=before, total=total, what=what)
        begun = before + 1
        if not self._live and begun % max(1, total // 5) == 0:
            print(f"{begun}/{total} replays", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, number, whole
    from placement_lab.replays import SAMPLE, SMALL, SOLVER_S

    parser = Parser(
        description="Replays batches of recorded routing under each predictor, planner, split and trigger, with the controller "
        "that serves: how even devices' loads would be, how well popularity was predicted, what that takes.",
        epilog="which part of a trace is used: a trace that is given to --train alone is trained on as a whole, one that is "
        "given to --serve alone is served as a whole.  One that is given to both is cut in halves, at the end of the sample "
        "nearest the middle: the first is trained on, the second served.  Without --train or without --serve, what the other "
        "names counts as given to both.  Tokens that fill no whole batch are not served.\n\n"
        "predictors: none (experts stay where training had them, once each), static (the trace's shares), window (the last "
        "batch), ema, distribution, path_table (Lina's, of paths of 3 layers), path_table_1 (of 1), path_table_kept (the top_k "
        "likeliest of a path alone), linear_map, linear_map_1 (looks one layer back), online_map, look_ahead (the layer's own "
        "router, asked one layer ahead: where all traces have its answers), look_ahead_map (corrected by how it erred in the "
        "trace), look_ahead_online (and in the batches served), oracle (knows the batch).\n\n"
        "examples:\n  tools/popularity_lab.py --serve a.npz\n"
        "  tools/popularity_lab.py --train a.npz b.npz --serve a.npz b.npz --alternate --json lab.json --plot lab.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", nargs="+", type=Path, default=[], metavar="NPZ", help="traces that predictors are fitted to")
    parser.add_argument("--serve", nargs="+", type=Path, default=[], metavar="NPZ", help="traces that are replayed")
    parser.add_argument(
        "--alternate", action="store_true", help="a batch of each served trace in turn (default: one after another)"
    )
    parser.add_argument("--batch-tokens", type=whole(1, 2**31 - 1), default=1024, metavar="N", help="(default: 1024)")
    parser.add_argument(
        "--devices", type=whole(1, 65536), default=8, metavar="N", help="each has an equal part of the tokens (default: 8)"
    )
    parser.add_argument(
        "--devices-per-node", type=whole(0, 65536), default=0, metavar="N", help="planner hierarchical (default: two nodes)"
    )
    parser.add_argument(
        "--slots", type=whole(1, 1 << 20), default=10, metavar="N", help="places for experts on a device (default: 10)"
    )
    parser.add_argument(
        "--first-layer",
        type=whole(0, 100_000),
        default=3,
        metavar="L",
        help="MoE layers from this one on count (default: 3, the fourth, from which on paths of three layers are known)",
    )
    parser.add_argument(
        "--warm-up-batches", type=whole(0, 2**31 - 1), default=0, metavar="N", help="served first, not counted (default: 0)"
    )
    parser.add_argument(
        "--experts", type=whole(0, 1 << 20), default=0, metavar="E", help="of the traces, where their files don't say"
    )
    parser.add_argument(
        "--top1-experts", type=whole(0, 1 << 20), default=0, metavar="E", help="first choices alone, experts merged to so many"
    )
    parser.add_argument("--predictors", default="", metavar="A,B", help="default: all")
    parser.add_argument("--replan-rows", type=number(), metavar="X", help="trigger gain: planning anew takes as long as so many "
                        "rows on the busiest device (default: a tenth of a device's mean rows)")  # fmt: skip
    parser.add_argument("--optimum", action="store_true", help=f"how far from the exact optimum: all layers of batches up to "
                        f"{SMALL} experts, else {SAMPLE} by chance (needs scipy; up to {SOLVER_S:g} s each)")  # fmt: skip
    parser.add_argument("--seed", type=whole(), default=0, metavar="N", help="of that sample (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="95th percentiles as bars by predictor; .svg too")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy comes in: small products are faster so, and steadier
    sys.path.insert(0, str(ROOT))  # placement_lab/
    from megalina.console import command

    command(main)
