"""Verify layouts: does every layout of a configuration's model give the numbers of one process?

python tools/verify_layouts.py [OVERRIDES] --ranks N [--pairs WHEN] [--only KIND=A,B] [--json FILE] [--plant BUG | --list-plants]
"""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.config import PretrainConfig
    from megalina.verify.layouts import Choices, Row
    from megalina.verify.verification import Result

DIFFERENT, BAD_INPUT = 1, 2  # exit codes
MOST_PLANTED = 6  # rows
MODES = ("auto", "always", "never")


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return 130


def _main(argv: Sequence[str] | None) -> int:
    from megalina.arguments import Parser, whole

    parser = Parser(
        description="Shrinks the configuration's model, keeps all its mechanisms, and runs some steps in float64 on every layout "
        "and on one process.  Every activation, routing decision, loss, gradient and weight must be equal.  Exit code 0: all "
        "are, 1: some differ, 2: bad input.",
        epilog="Layouts are the tool's: parallel.* and launch.ranks do nothing.  launch.device=cuda runs on GPUs, one a rank.",
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py: model=laptop router=sigmoid")
    parser.add_argument(
        "--ranks", type=whole(1, 1024), default=4, metavar="N", help="worlds of 1, 2, 4, ... up to N ranks (default: 4)"
    )
    parser.add_argument(
        "--pairs", nargs="?", const="always", default="auto", metavar="WHEN",
        help="always (or no word): few rows, in which every pair of choices occurs; never: every combination; "
        "auto (default): every combination if they are few",
    )  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="KIND=A,B",
                        help="rows with these alone: strategy=flow, router=topk,hash, schedule=zbv,none (of pipelines; none: "
                        "one stage); may be given for each")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plant", default="", metavar="BUG", help="build this bug into the ranks and see whether it is found")
    parser.add_argument("--list-plants", action="store_true", help="the bugs that can be planted")
    args = parser.parse_intermixed_args(argv)
    if args.pairs not in MODES and "=" in args.pairs:  # --pairs model=laptop
        args.overrides, args.pairs = [args.pairs, *args.overrides], "always"
    if args.list_plants:
        return _list_plants()
    from megalina.explain import explain

    try:
        if args.pairs not in MODES:
            raise ValueError(f"--pairs {args.pairs}: choose one of {', '.join(MODES)}")
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
        choices, rows, how = chosen(args.overrides, ranks=args.ranks, mode=args.pairs, plant=args.plant, only=args.only)
    except Exception as error:
        if not _is_input(error):
            raise
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    print(how, flush=True)
    results = run(choices, rows, device=_device(choices.base), plant=args.plant)
    print(table(results))
    for line in findings(results):
        print(line)
    print(closing_line(results))
    if args.json:
        args.json.write_text(json.dumps(as_json(results, planted=bool(args.plant)), indent=1, allow_nan=False) + "\n")
    return 0 if all(r.equal for r in results) else DIFFERENT


def chosen(
    overrides: list[str], *, ranks: int, mode: str, plant: str, only: Sequence[str] = ()
) -> "tuple[Choices, list[Row], str]":
    """What is run, and for people how it was chosen; ValueError, or an error of Hydra, for bad input."""
    planted = _plant(plant) if plant else None
    if planted is not None:
        ours = tuple(planted.overrides)
        keys = {o.split("=")[0].lstrip("+~") for o in ours}
        overrides = [o for o in overrides if o.split("=")[0].lstrip("+~") not in keys] + list(ours)
    choices = choices_of(overrides, ranks)
    from megalina.step.pipeline.schedules.table import SCHEDULES
    from megalina.verify import layouts

    choices = layouts.only(choices, only)
    if planted is None:
        rows, how = layouts.chosen_rows(choices, ranks, mode)
        made = {row.layout.pipeline for row in rows if row.layout.pp > 1}
        if unused := [name for name in choices.schedules if name not in (layouts.NO_PIPELINE, *SCHEDULES, *made)]:
            raise ValueError(
                f"strategy.pipeline={unused[0]} is made for none of the rows, which have up to {ranks} ranks, "
                f"{layouts.CHUNKS[-1]} chunks and {layouts.SEQUENCES} micro-batches: raise --ranks, or leave it out"
            )
        return choices, rows, how
    rows = _planted_rows(choices, ranks, planted)
    if not rows:
        raise ValueError(f"--plant {plant} changes nothing in any layout of up to {ranks} ranks: raise --ranks")
    return choices, rows, f"planted: {planted.what}; {len(rows)} rows in which it acts"


AS_MODEL = "as_model"  # the file of conf/router that says nothing: what a model says is "yours"


def choices_of(overrides: list[str], ranks: int) -> "Choices":
    """The shrunk configuration, with every router and every strategy that there is."""
    from megalina import launch, validate
    from megalina.compose import CONF, compose
    from megalina.config import ParallelConfig, StrategyConfig
    from megalina.reference import is_reference
    from megalina.step.strategy import STRATEGIES

    own = compose(overrides)
    one_batch = replace(own.train, global_batch_size=own.train.micro_batch_size)
    one_stage = replace(own.strategy, pipeline=StrategyConfig().pipeline)
    validate.check_config(replace(own, parallel=ParallelConfig(), train=one_batch, strategy=one_stage), 1)
    from megalina.verify.layouts import Choices  # torch, which a mistake need not wait for
    from megalina.verify.shrink import shrink, shrink_router

    base = shrink(own, ranks)
    _check_machine(replace(base, launch=replace(base.launch, ranks=ranks, device=_device(base))), launch.num_cores())
    others = [o for o in overrides if o.split("=")[0].lstrip("+~").split(".")[0] != "router"]
    routers = {"yours": base.router}
    for path in sorted((CONF / "router").glob("*.yaml")):
        if path.stem == AS_MODEL:
            continue
        router = compose([*others, f"router={path.stem}"]).router
        if router == own.router:
            routers = {path.stem: base.router} | {k: v for k, v in routers.items() if k != "yours"}
        else:
            routers[path.stem] = shrink_router(router, own.model.num_experts, base.model.num_experts)
    without = [o for o in overrides if o.split("=")[0] not in ("strategy", "strategy.name")]
    strategies = {name: compose([*without, f"strategy={name}"]).strategy for name in STRATEGIES}
    strategies |= {own.strategy.name: own.strategy} if is_reference(own.strategy.name) else {}
    found = Choices(base, routers, strategies, {base.model.name: base.model}, {base.optim.name: base.optim})
    return replace(found, schedules=tuple(dict.fromkeys((*found.schedules, _known_schedule(own.strategy.pipeline)))))


def _known_schedule(name: str) -> str:
    from megalina.blocks.pipelined import TABLE, schedule_of

    try:
        if not name.endswith(TABLE):
            schedule_of(name)
        elif not Path(name).is_file():
            raise ValueError("there is no such file")
    except ValueError as error:
        raise ValueError(f"strategy.pipeline={name}: {error}") from None
    return name


def run(choices: "Choices", rows: "list[Row]", *, device: str, plant: str) -> "list[Result]":
    """The results of all rows; progress goes to stderr."""
    from megalina.rank_pool import stop_server
    from megalina.verify.verification import verify

    results = []
    found = verify(choices, rows, device=device, plant=plant)
    with _ended_by_sigterm():
        try:
            with closing(found), _Progress(len(rows)) as progress:
                for result in found:
                    results.append(result)
                    progress.update(result)
        finally:
            stop_server()
    return results


def table(results: "list[Result]") -> str:
    """A line a row."""
    head = ("layout", "router", "strategy", "first difference", "largest error", "s")
    lines = [
        (
            str(r.row.layout),
            r.row.router_text,
            r.row.layout.strategy,
            r.first_difference or "equal",
            f"{r.largest_error:.1e}",
            f"{r.seconds:.1f}",
        )
        for r in results
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in [head, *lines])


def findings(results: "list[Result]") -> list[str]:
    """Causes with the rows that show them, and what failed."""
    causes: dict[str, list[str]] = {}
    for r in results:
        if r.cause:
            causes.setdefault(f"{r.named}: {r.cause}", []).append(str(r.row.layout))
    lines = [f"\n{cause}\n  in {len(rows)} row{'s' * (len(rows) > 1)}, first {rows[0]}" for cause, rows in causes.items()]
    return lines + [f"\n{r.row.layout}, {r.row.router_text} failed:\n{r.failed}" for r in results if r.failed]


def closing_line(results: "list[Result]") -> str:
    """What came out, in one line."""
    from megalina.track.progress import duration

    different, failed = sum(not r.equal and not r.failed for r in results), sum(bool(r.failed) for r in results)
    took = duration(sum(r.seconds for r in results))
    if different or failed:
        return f"\n{len(results)} rows: {different} differ from one process, {failed} failed; {took}"
    error, share = max(r.largest_error for r in results), max(r.largest_share for r in results)
    return f"\n{len(results)} rows: all equal to one process, largest error {error:.1e} ({share:.1%} of what is allowed); {took}"


def as_json(results: "list[Result]", *, planted: bool) -> dict[str, Any]:
    """Errors that are not finite become null, as JSON has none."""
    from megalina.verify.verification import common_cause

    rows = []
    for r in results:
        row: dict[str, Any] = {
            "layout": asdict(r.row.layout),
            "router": r.row.router,
            "capacity": r.row.capacity,
            "strategy": r.row.layout.strategy,
            "equal": r.equal,
            "first_difference": r.first_difference or None,
            "largest_error": r.largest_error if math.isfinite(r.largest_error) else None,
            "seconds": round(r.seconds, 3),
            "failed": r.failed or None,
            "cause": r.cause or None,
        }
        rows.append(row | {"named": r.named, "candidates": list(r.candidates)} if planted else row)
    return {"rows": rows, "named": common_cause(results)} if planted else {"rows": rows}


class _Progress:
    """How far it is, on stderr: a live bar on a terminal, else a line now and then; rows that differ are named at once."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._total, self._done, self._different = total, 0, 0
        self._live = sys.stderr.isatty()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            redirect_stdout=False,
            disable=not self._live,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("verify", total=total, numbers="starting")

    def update(self, result: "Result") -> None:
        self._done += 1
        if not result.equal:
            self._different += 1
            self._bar.console.print(f"{result.row.layout}, {result.row.router_text}: {result.first_difference}", soft_wrap=True)
        self._bar.update(self._task, advance=1, numbers=f"{self._different} differ")
        if not self._live and (self._done % max(1, self._total // 10) == 0 or self._done == self._total):
            print(f"{self._done}/{self._total} rows, {self._different} differ", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _list_plants() -> int:
    from megalina.verify.plants import PLANTS

    width = max(map(len, PLANTS))
    for name, plant in PLANTS.items():
        print(f"{name:{width}}  {plant.what}")
    return 0


def _plant(name: str) -> Any:
    from megalina.nearest import nearest
    from megalina.verify.plants import PLANTS

    if name not in PLANTS:
        raise ValueError(f"--plant {name}: there is no such bug{nearest(name, PLANTS)}; see --list-plants")
    return PLANTS[name]


def _planted_rows(choices: "Choices", ranks: int, plant: Any) -> "list[Row]":
    """Some rows of the user's own router in which a bug acts, of different places and with different other choices; in pipelines,
    of different schedules, where it acts nowhere else."""
    from megalina.verify.layouts import axes, axes_of_pipelines, config_of, in_order, product

    name = next(iter(choices.routers))
    own = replace(choices, routers={name: choices.routers[name]}, strategies=dict(list(choices.strategies.items())[:1]))
    fixed: dict[str, list[Any]] = {"capacity": [choices.routers[name].capacity_factor > 0]}
    by_kind: dict[tuple[Any, ...], list[Row]] = {}
    for recompute in ("none", "full"):  # some bugs act only where backward computes forward again
        fixed["recompute"] = [recompute]
        for row in product(own, ranks, options=axes(own, ranks) | fixed):
            at = row.layout
            if plant.applies(at, config_of(own, row)):
                by_kind.setdefault((at.world, at.tp, at.ep, at.sequence), []).append(row)
        if by_kind:
            break
    if not by_kind:
        fixed["recompute"] = ["none"]
        for row in product(own, ranks, options=axes_of_pipelines(own, ranks) | fixed | {"context": [(1, "all_gather")]}):
            at = row.layout
            if plant.applies(at, config_of(own, row)):
                by_kind.setdefault((at.pipeline,), []).append(row)
    most = max(map(len, by_kind.values()), default=0)
    found: dict[Row, None] = {}
    for turn in range(most):
        for i, rows in enumerate(reversed(by_kind.values())):
            found[rows[(turn + i * len(rows) // len(by_kind)) % len(rows)]] = None
    return in_order(list(found)[:MOST_PLANTED])


def _device(config: "PretrainConfig") -> str:
    """GPUs only where they are asked for: small models in float64 are no faster there."""
    return "cuda" if config.launch.device == "cuda" else "cpu"


def _check_machine(config: "PretrainConfig", num_cores: int) -> None:
    import torch

    from megalina.validate import check_machine

    num_gpus = torch.cuda.device_count() if config.launch.device == "cuda" else 0
    check_machine(config, local_ranks=config.launch.ranks, num_cores=num_cores, num_gpus=num_gpus, apex=False, wandb_key=True)


def _is_input(error: Exception) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, (HydraException, OmegaConfBaseException, ValueError, OSError))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as an exception does: the ranks end first."""

    def end(signum: int, _: object) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    from megalina.console import command

    command(main)
