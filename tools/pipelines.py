"""Pipeline schedules: the list of every rank, its bubble and memory beside the formulas, and what the check over all lists says.

python tools/pipelines.py zbv --stages 4 --micro-batches 8 [--times F,B,W,P2P] [--picture FILE] [--csv FILE] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalina.arguments import Parser, new_file, number, whole
from megalina.perfmodel.forecast.pipeline_cells import boxes_of
from megalina.reference import is_reference, load
from megalina.step.pipeline.cell import WEIGHTS_DONE, Pipeline, entry_text, loop
from megalina.step.pipeline.check import check
from megalina.step.pipeline.live import live_peaks
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.schedules.schedule import Schedule, Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.stages import StageLayers, cut, layout_of, stages_from
from megalina.step.pipeline.torch_table import from_csv, to_csv
from megalina.step.pipeline.walk import Stuck, Times, Walked, walk
from megalina.timeline.pipeline_picture import draw_pipeline

REFUSED, BAD_INPUT = 1, 2  # exit codes: the check refuses the lists; a wrong argument
SHOWN = 400  # characters of a rank's list


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        title, schedule, size, pipeline, stages = _asked(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    times = size.times
    said, checked = _checked(pipeline, times)
    print(title)
    for rank, entries in enumerate((checked if args.messages else pipeline).lists):
        text = " ".join(map(entry_text, entries))
        print(f"rank {rank}  {text if len(text) <= SHOWN or args.all else text[:SHOWN].rpartition(' ')[0] + ' ...'}")
    for stage, layers in enumerate(stages):
        print(f"stage {stage} on rank {pipeline.rank_of[stage]}: {layers}")
    if stages and pipeline.rank_of == loop(pipeline.ranks, pipeline.stages // pipeline.ranks):
        print(f"as Megatron's layout: {layout_of(stages)}")
    told: dict[str, Any] = {"schedule": title, "check": said, "lists": [" ".join(map(entry_text, own)) for own in pipeline.lists]}
    try:
        walked = walk(pipeline, times)
    except Stuck:
        walked = None
    if walked is not None:
        told |= _told(walked, pipeline, schedule, size)
        print(_table(told))
    print("\n".join(f"check: {line}" for line in said))
    if args.csv is not None:
        args.csv.write_text(to_csv(checked if args.messages else pipeline))
    if args.json is not None:
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    if args.picture is not None and walked is not None:
        draw_pipeline(args.picture, boxes_of(walked, pipeline), title=title, note=_note(times))
    return 0 if said[-1].startswith("legal") else REFUSED


Asked = tuple[str, Schedule | None, Size, Pipeline, tuple[StageLayers, ...]]


def _asked(args: argparse.Namespace) -> Asked:
    """Title, schedule if it is not a table, size, lists and layers.  ValueError for what doesn't fit."""
    if (args.schedule is None) == (args.from_csv is None):
        raise ValueError(f"give a schedule, one of {', '.join(SCHEDULES)}, or a table: --from-csv FILE")
    forward, inputs, weights, message = args.times
    times = Times(forward, inputs, weights, message, args.pair or 1.0)
    if args.from_csv is not None:
        if args.stages or args.chunks or args.micro_batches:
            raise ValueError("--from-csv: the table says how many ranks, chunks and micro-batches there are; leave them out")
        pipeline = from_csv(args.from_csv.read_text())
        chunks = pipeline.stages // pipeline.ranks
        schedule, name = None, args.from_csv.name
    else:
        if not (args.stages and args.micro_batches):
            raise ValueError(f"{args.schedule}: give --stages and --micro-batches")
        schedule, name = _schedule(args.schedule), args.schedule
        chunks = args.chunks or schedule.chunks or 1
    ranks = args.stages or pipeline.ranks
    stages = _layers(args, ranks * chunks)
    if stages:
        first, last = args.ends
        costs = [len(stage.layers) + first * stage.embedding + last * stage.head for stage in stages]
        times = replace(times, shares=tuple(cost * ranks / sum(costs) for cost in costs))
    size = Size(ranks, chunks, args.micro_batches or 1, times, args.room, paired=args.pair is not None)
    if schedule is not None:
        pipeline = schedule.pipeline(size)
    size = replace(size, micro_batches=pipeline.micro_batches)
    title = f"{name}: {ranks} ranks, {chunks} {'chunk' if chunks == 1 else 'chunks'} each, {size.micro_batches} micro-batches"
    return title, schedule, size, pipeline, stages


def _schedule(name: str) -> Schedule:
    if name in SCHEDULES:
        return SCHEDULES[name]
    if not is_reference(name):
        raise ValueError(
            f"there is no schedule {name}: choose one of {', '.join(SCHEDULES)}, or yours as folder/file.py:SCHEDULE"
        )
    found = load(name)
    if not isinstance(found, Schedule):
        raise ValueError(f"{name} is no Schedule (megalina/step/pipeline/schedules/schedule.py)")
    return found


def _layers(args: argparse.Namespace, stages: int) -> tuple[StageLayers, ...]:
    if args.layout and args.layers:
        raise ValueError("give --layout, or --layers to have them cut, not both")
    if args.layers:
        return cut([1.0] * args.layers, stages, embedding=args.ends[0], head=args.ends[1])
    if not args.layout:
        return ()
    found = stages_from(args.layout)
    if len(found) != stages:
        raise ValueError(f"--layout has {len(found)} stages, and the schedule {stages}: P x V of --stages P --chunks V")
    return found


def _checked(pipeline: Pipeline, times: Times) -> tuple[list[str], Pipeline]:
    """What the check says, line by line, the verdict last; and the lists with messages, as far as there are any."""
    try:
        if not pipeline.has_messages:
            check(pipeline)
            sent = with_messages(pipeline, times if min(times.shares, default=1.0) > 0 else replace(times, shares=()))
            check(sent)
            return [
                f"legal: complete, in order; {_messages(sent)} put in, and no circle where every SEND waits for its RECV"
            ], sent
        check(pipeline, meet=False)
    except ValueError as error:
        return [str(error)], pipeline
    try:
        check(pipeline)
    except Stuck as error:
        return [
            f"where every SEND waits for its RECV, {error}",
            "legal where only the cell that reads a message waits for it",
        ], pipeline
    return [f"legal: complete, in order; {_messages(pipeline)}, and no circle where every SEND waits for its RECV"], pipeline


def _messages(pipeline: Pipeline) -> str:
    cells = (cell for rank in range(pipeline.ranks) for _, cell in pipeline.cells(rank))
    count = sum(cell.work.value.startswith("SEND") for cell in cells)
    return f"{count} message{'s' * (count != 1)}"


def _told(walked: Walked, pipeline: Pipeline, schedule: Schedule | None, size: Size) -> dict[str, Any]:
    plain = replace(size, times=replace(size.times, message=0.0, shares=()))
    alike = not size.times.shares and not size.times.message
    bubble = schedule.bubble(plain) if schedule is not None and alike else None
    peaks = [schedule.peak(plain, rank) if schedule is not None else None for rank in range(pipeline.ranks)]
    return {
        "step": walked.makespan,
        "busy": walked.busy,
        "idle": walked.idle,
        "idle_by_formula": bubble,
        "formula_is_bound": schedule is not None and schedule.bubble_is_bound,
        "peak": live_peaks(pipeline),
        "peak_by_formula": peaks,
        "peak_until_weights": live_peaks(pipeline, WEIGHTS_DONE),
    }


def _table(told: dict[str, Any]) -> str:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    head = ("rank", "busy", "idle", "formula", "peak", "formula", "peak until W")
    rows = [
        (str(rank), shown(busy), shown(idle), shown(told["idle_by_formula"]), shown(peak), shown(formula), shown(kept))
        for rank, (busy, idle, peak, formula, kept) in enumerate(
            zip(told["busy"], told["idle"], told["peak"], told["peak_by_formula"], told["peak_until_weights"], strict=True)
        )
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    bound = "  (the formula is a bound)" if told["formula_is_bound"] and told["idle_by_formula"] is not None else ""
    idlest = max(told["idle"])
    return "\n".join([f"step {shown(told['step'])}, {idlest / told['step']:.1%} of it idle{bound}", *lines])


def _note(times: Times) -> str:
    words = f"forward {times.forward:g}, gradients of inputs {times.inputs:g}, of weights {times.weights:g}"
    return f"of a rank's layers: {words}; a message {times.message:g}"


def _numbers(count: int) -> Any:
    def read(text: str) -> tuple[float, ...]:
        words = text.split(",")
        if len(words) != count:
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {count} numbers with commas between them")
        return tuple(map(number(), words))

    return read


def _times(text: str) -> tuple[float, ...]:
    found: tuple[float, ...] = _numbers(4)(text)
    if min(found[:3]) <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]}: F, B and W must be above 0")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Prints the list of every pipeline rank, walks all of them together in virtual time, and holds bubble and "
        "activations against the schedule's formulas.  Nothing is started and nothing is measured.  Exit code 1: the check "
        "refuses the lists.",
        epilog="examples:\n  tools/pipelines.py 1f1b --stages 4 --micro-batches 8\n"
        "  tools/pipelines.py dualpipev --stages 4 --micro-batches 12 --pair 0.7 --picture dualpipev.png\n"
        "  tools/pipelines.py greedy --stages 4 --chunks 2 --micro-batches 12 --times 1,1.2,0.8,0.05 --room 3\n"
        "  tools/pipelines.py --from-csv torch.csv --picture torch.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("schedule", nargs="?", metavar="SCHEDULE", help=f"{', '.join(SCHEDULES)}, or folder/file.py:SCHEDULE")
    parser.add_argument(
        "--stages", type=whole(1, 1024), metavar="P", help="ranks of the pipeline, its stages as Megatron counts them"
    )
    parser.add_argument(
        "--chunks", type=whole(1, 64), metavar="V", help="stages that each rank holds (default: the schedule's, else 1)"
    )
    parser.add_argument("--micro-batches", type=whole(1, 65536), metavar="M")
    parser.add_argument(
        "--times",
        type=_times,
        default=(1.0, 1.0, 1.0, 0.0),
        metavar="F,B,W,P2P",
        help="of a rank's layers and a micro-batch: forward, gradients of inputs, of weights; of a message (default: 1,1,1,0)",
    )
    parser.add_argument(
        "--pair",
        type=number(0, 1, above=True),
        metavar="X",
        help="forwards and backwards go in pairs, as with strategy=pair, each of which takes so much of its two cells, 1 at most",
    )
    parser.add_argument(
        "--room", type=number(), default=0.0, metavar="X", help="greedy: micro-batches of activations on a rank (default: P)"
    )
    parser.add_argument("--layers", type=whole(1, 65536), default=0, metavar="N", help="cut so many layers into stages")
    parser.add_argument("--layout", default="", metavar="TEXT", help="stages as Megatron writes them, 'Et*3|(tt|)*5,tL'")
    parser.add_argument(
        "--ends",
        type=_numbers(2),
        default=(0.0, 0.0),
        metavar="E,L",
        help="what embedding and head cost, in layers (default: 0,0)",
    )
    parser.add_argument("--messages", action="store_true", help="print, and write to --csv, SEND and RECV too")
    parser.add_argument("--all", action="store_true", help="print lists to their ends, however long")
    parser.add_argument(
        "--from-csv", type=Path, metavar="FILE", help="a table of torch.distributed.pipelining in place of a schedule"
    )
    parser.add_argument("--csv", type=new_file, metavar="FILE", help="write such a table")
    parser.add_argument("--picture", type=new_file, metavar="FILE", help="PNG or SVG")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all that is printed, as numbers")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
