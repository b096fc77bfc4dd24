"""Pipelines on slow links: is a model better cut across nodes by its layers or by its experts, and by which schedule?

    sudo python benchmarks/pipelines.py --json FILE --picture PNG       (25 minutes on an idle machine; root, iproute2)
    sudo python benchmarks/pipelines.py --only 4x1 --rounds 1           (a first look)

Four nodes behind links of 500 Mbit/s, one or two ranks on each.  Either experts are on all ranks, and tokens cross the links, or
each node has two stages of the layers, and experts are on its ranks alone; 16 micro-batches a step.  Nodes, links and devices are
emulated (docs/cluster.md), in slow motion so that real math fits under the devices' time; trainer, math and losses are real.  All
take turns in one job, with the same weights and batches.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.cli.compare import Job

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from megalina.cli.compare import exit_code
    from megalina.explain import explain

    def run() -> None:
        try:
            compare_cuts(args)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, args.overrides)) from None

    return exit_code(run)


def compare_cuts(args: argparse.Namespace) -> None:
    from benchmarks.pipelining.report import draw, table

    found = measured(args)
    print("\n\n".join([*map(table, found["settings"]), f"({found['note']})"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if args.picture:
        draw(args.picture, found["settings"], note=found["note"])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Each setting as `megalina.compare.results.as_json` has it, with what is expected of each."""
    from benchmarks.pipelining.cases import SETTINGS, base_of, variants_of
    from megalina.cli.compare import job_of, note, run
    from megalina.compare.ladder import LINK_MBIT
    from megalina.namespaces import check_host

    only = args.only.split(",") if args.only else [s.name for s in SETTINGS]
    if unknown := [name for name in only if name not in {s.name for s in SETTINGS}]:
        raise ValueError(f"--only {','.join(unknown)}: there are {', '.join(s.name for s in SETTINGS)}")
    check_host()
    spec = argparse.Namespace(rounds=args.rounds, steps=args.steps, picture=None, trace=None)
    jobs, out = [], []
    with tempfile.TemporaryDirectory(prefix="megalina_pipelines_") as folder:
        for setting in (s for s in SETTINGS if s.name in only):
            slow = replace(setting, slow_motion=args.slow_motion or setting.slow_motion)
            variants = variants_of(slow)
            given = {"variants": variants, "base": base_of(slow), "link_mbit": LINK_MBIT, "overrides": args.overrides}
            jobs.append(job_of(slow, list(variants), **given))
        for job in jobs:
            rest = [name for name in job.configs if not name.startswith("eager")]
            found = run(job, spec, Path(folder), first=False, to_the_end=rest)
            out.append(found | expected(job, found["strategies"]))
    return {"settings": out, "note": note(jobs[0])}


def expected(job: "Job", strategies: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By name, in the cluster's own time: walk_s, of pipelines what cells and messages alone take; forecast_s, what the simulator
    says of the plan that ran."""
    from benchmarks.pipelining.cells import walk_s
    from benchmarks.pipelining.forecast import forecast_s
    from megalina.step.plan import Plan

    setting, link_mbit = job.setting, job.link_mbit
    out: dict[str, dict[str, float]] = {"walk_s": {}, "forecast_s": {}}
    for name, config in job.configs.items():
        plan = Plan.from_json(strategies[name]["plan_values"])
        found = {"forecast_s": forecast_s(config, plan, setting.world)}
        alone_s = walk_s(config, link_mbit=link_mbit, ranks_per_node=setting.ranks_per_node) if config.parallel.pp > 1 else None
        found |= {} if alone_s is None else {"walk_s": alone_s}
        for key, seconds in found.items():
            out[key][name] = seconds / setting.slow_motion
    tuned = next(n for n in job.configs if n.startswith("eager") and strategies[n] == strategies["eager"])
    out["forecast_s"]["eager"] = out["forecast_s"][tuned]
    return out


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, number, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py, for all who compete")
    parser.add_argument("--only", default="", metavar="A,B", help="clusters: 4x1,4x2 (default: both)")
    parser.add_argument("--slow-motion", type=number(0, 1e6, above=True), metavar="F", help="default: 2 for 4x1, 4 for 4x2")
    parser.add_argument("--rounds", type=whole(1, 1_000_000), default=3, metavar="N", help="turns of each (default: 3)")
    parser.add_argument("--steps", type=whole(1, 1_000_000), default=1, metavar="N", help="timed steps a turn (default: 1)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all numbers")
    parser.add_argument("--picture", type=new_file, metavar="PNG", help="where a step's time goes; .svg too")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from megalina.console import command

    command(main)
