"""Pipelines on slow links: is a model better cut across nodes by its layers or by its experts, and by which schedule?

    sudo python benchmarks/pipelines.py --json FILE --picture PNG       (25 minutes on an idle machine; root, iproute2)
    sudo python benchmarks/pipelines.py --only 4x1 --rounds 1           (a first look)
    python benchmarks/pipelines.py --measured FILE --host HOST          (forecasts again, of what was measured)

Four nodes behind links of 500 Mbit/s, one or two ranks on each.  Either experts are on all ranks, and tokens cross the links, or
each node has two stages of the layers, and experts are on its ranks alone; 16 micro-batches a step.  Nodes, links and devices are
emulated (docs/cluster.md), in slow motion so that real math fits under the devices' time; trainer, math and losses are real.  All
take turns in one job, with the same weights and batches.

Forecasts are of devices and links alone, and with `--host` of hosts and sockets, too: their constants were fitted on other steps
of the same machine, by benchmarks/validate_simulator.py --json HOST.
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
    from benchmarks.validation.emulated import HostConstants
    from megalina.cli.compare import Job
    from megalina.compare.ladder import Setting

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
    from benchmarks.validate_simulator import results

    found = results(args.measured, "overrides", "this benchmark") if args.measured else measured(args)
    foresee(found, args)
    print("\n\n".join([*map(table, found["settings"]), f"({found['note']})"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if args.picture:
        draw(args.picture, found["settings"], note=found["note"])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Each setting as `megalina.compare.results.as_json` has it, and the overrides."""
    from benchmarks.pipelining.cases import SETTINGS
    from megalina.cli.compare import note, run
    from megalina.namespaces import check_host

    only = args.only.split(",") if args.only else [s.name for s in SETTINGS]
    if unknown := [name for name in only if name not in {s.name for s in SETTINGS}]:
        raise ValueError(f"--only {','.join(unknown)}: there are {', '.join(s.name for s in SETTINGS)}")
    check_host()
    spec = argparse.Namespace(rounds=args.rounds, steps=args.steps, picture=None, trace=None)
    jobs = [job_in(replace(s, slow_motion=args.slow_motion or s.slow_motion), args.overrides) for s in SETTINGS if s.name in only]
    out = []
    with tempfile.TemporaryDirectory(prefix="megalina_pipelines_") as folder:
        for job in jobs:
            rest = [name for name in job.configs if not name.startswith("eager")]
            out.append(run(job, spec, Path(folder), first=False, to_the_end=rest))
    return {"settings": out, "note": note(jobs[0]), "overrides": args.overrides}


def job_in(setting: "Setting", overrides: Sequence[str]) -> "Job":
    from benchmarks.pipelining.cases import base_of, variants_of
    from megalina.cli.compare import job_of
    from megalina.compare.ladder import LINK_MBIT

    variants = variants_of(setting)
    base = base_of(setting)
    return job_of(setting, list(variants), variants=variants, base=base, link_mbit=LINK_MBIT, overrides=overrides)


def foresee(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what is expected into what was measured."""
    from benchmarks.pipelining.cases import SETTINGS
    from benchmarks.validate_simulator import results
    from benchmarks.validation.emulated import HostConstants

    host = None
    if args.host:
        host = HostConstants(**results(args.host, "host", "benchmarks/validate_simulator.py")["host"])
    by_name = {setting.name: setting for setting in SETTINGS}
    for of in found["settings"]:
        job = job_in(replace(by_name[of["name"]], slow_motion=of["slow_motion"]), found["overrides"])
        of |= expected(job, of["strategies"], host)


def expected(job: "Job", strategies: Mapping[str, Any], host: "HostConstants | None") -> dict[str, dict[str, float]]:
    """By name, in the cluster's own time: walk_s, of pipelines what cells and messages alone take; forecast_s, what the simulator
    says of the plan that ran; with_hosts_s, the same with `host`."""
    from benchmarks.pipelining.cells import walk_s
    from benchmarks.pipelining.forecast import forecast_s, with_hosts_s
    from megalina.step.plan import Plan

    setting, link_mbit = job.setting, job.link_mbit
    out: dict[str, dict[str, float]] = {"walk_s": {}, "forecast_s": {}, "with_hosts_s": {}}
    for name, config in job.configs.items():
        plan = Plan.from_json(strategies[name]["plan_values"])
        found = {"forecast_s": forecast_s(config, plan, setting.world)}
        if host is not None:
            found["with_hosts_s"] = with_hosts_s(config, plan, setting, link_mbit=link_mbit, host=host)
        alone_s = walk_s(config, link_mbit=link_mbit, ranks_per_node=setting.ranks_per_node) if config.parallel.pp > 1 else None
        found |= {} if alone_s is None else {"walk_s": alone_s}
        for key, seconds in found.items():
            out[key][name] = seconds / setting.slow_motion
    tuned = next(n for n in job.configs if n.startswith("eager") and strategies[n] == strategies["eager"])
    for of_all in out.values():
        if tuned in of_all:
            of_all["eager"] = of_all[tuned]
    return out


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, number, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py, for all who compete")
    parser.add_argument("--only", default="", metavar="A,B", help="clusters: 4x1,4x2 (default: both)")
    parser.add_argument("--slow-motion", type=number(0, 1e6, above=True), metavar="F", help="default: 2 for 4x1, 4 for 4x2")
    parser.add_argument("--rounds", type=whole(1, 1_000_000), default=3, metavar="N", help="turns of each (default: 3)")
    parser.add_argument("--steps", type=whole(1, 1_000_000), default=1, metavar="N", help="timed steps a turn (default: 1)")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="don't measure: take what was written with --json")
    parser.add_argument("--host", type=Path, metavar="FILE", help="what hosts take: what validate_simulator.py wrote with --json")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all numbers")
    parser.add_argument("--picture", type=new_file, metavar="PNG", help="where a step's time goes; .svg too")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from megalina.console import command

    command(main)
