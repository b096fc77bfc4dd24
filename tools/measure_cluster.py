"""Measure the machine this runs on, write conf/cluster/this_machine.yaml, and hold forecasts against real steps.

examples:
  python tools/measure_cluster.py                              some minutes; writes conf/cluster/this_machine.yaml
  python tools/measure_cluster.py --ranks 4 --out conf/cluster/four_ranks.yaml --json figures.json
  torchrun --nnodes 2 --nproc-per-node 8 ... tools/measure_cluster.py          links between nodes, too
  python tools/measure_cluster.py --check                      forecasts with cluster=this_machine against short runs here
  python tools/measure_cluster.py --host                       where a host's time goes in a step, schedule by schedule
  python tools/plan.py experiment=laptop cluster=this_machine nodes=1          what the file is for

All ranks compute the same at the same time, with the threads that the trainer gives them: one rank alone would have caches,
memory and clock for itself, and flatter.  Everything is measured twice, and the faster time counts.  Nothing else should run
meanwhile; where it does, a warning says so.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.config import PretrainConfig
    from megalina.launch import Member

ROOT = Path(__file__).resolve().parent.parent
FILE = Path("conf/cluster/this_machine.yaml")
FAILED, BAD_INPUT = 1, 2  # exit codes
SECONDS = 0.1
STEPS = 10


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from megalina import launch
    from megalina.explain import explain

    member = launch.joined(os.environ)
    try:
        check_arguments(args, member)
        ranks = member.world if member else args.ranks or default_ranks(args.device)
        if args.check:
            return check(args, ranks, member)
        if args.host:
            return host(args, ranks, member)
        return measure(args, ranks, member)
    except launch.Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except launch.RankFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    except Exception as error:  # what Hydra raises is no ValueError
        if not isinstance(error, ValueError | OSError) and not type(error).__module__.startswith(("hydra", "omegaconf")):
            raise
        print(explain(error, []), file=sys.stderr)
        return BAD_INPUT


def check_arguments(args: argparse.Namespace, member: "Member | None") -> None:
    """ValueError for what can't be, before anything starts."""
    from megalina.launch import num_cores
    from megalina.validate import MAX_RANKS_A_CORE

    for path in filter(None, (args.json, args.out)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    if args.out.suffix != ".yaml":
        raise ValueError(f"--out {args.out} must end in .yaml, as cluster=NAME reads conf/cluster/NAME.yaml")
    if member and args.ranks:
        raise ValueError(f"--ranks {args.ranks}: {member.launcher} has started {member.world} ranks; leave it out")
    if args.ranks is not None and args.ranks > MAX_RANKS_A_CORE * num_cores():
        most = f"{MAX_RANKS_A_CORE * num_cores()}, {MAX_RANKS_A_CORE} for each of {num_cores()} cores"
        raise ValueError(f"--ranks {args.ranks} must be 1 to {most}")
    device_kind(args.device)


def device_kind(asked: str) -> str:
    """cpu or cuda; ValueError for a GPU that torch doesn't see."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU: leave it out, or install a CUDA build of torch")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def default_ranks(asked: str) -> int:
    """A rank for each GPU or core."""
    import torch

    from megalina.launch import num_cores

    return torch.cuda.device_count() if device_kind(asked) == "cuda" else num_cores()


def measure(args: argparse.Namespace, ranks: int, member: "Member | None") -> int:
    from megalina.launch import num_cores
    from megalina.measure.cluster_file import cluster_file, cluster_of
    from megalina.measure.figures import Measured, figures_of
    from megalina.measure.report import as_json, report, warnings
    from megalina.validate import check_hardware

    spec = {"what": "measure", "device": device_kind(args.device), "seconds": args.seconds}
    raw = run_ranks(spec, ranks, member)
    if raw is None:
        return 0
    tuples = {name: tuple(raw[name]) for name in ("passes", "dtypes")}
    measured = Measured(**(raw | tuples))
    figures = figures_of(measured)
    cluster = cluster_of(args.out.stem, measured, figures)
    check_hardware(cluster)
    print(report(measured, figures, cluster))
    started = f"under {member.launcher}" if member else f"--ranks {ranks}"
    command = f"tools/measure_cluster.py --seconds {args.seconds:g} {started}"
    args.out.write_text(cluster_file(args.out.stem, measured, figures, day=date.today().isoformat(), command=command))
    print(f"\n{args.out} is written; in conf/cluster it is cluster={args.out.stem} for tools/plan.py")
    for warning in warnings(measured, num_cores()):
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(as_json(measured, figures, cluster), indent=1, allow_nan=False) + "\n")
    return 0


def check(args: argparse.Namespace, ranks: int, member: "Member | None") -> int:
    """Short runs of the trainer on ranks of this machine against their forecasts."""
    from megalina.cli.train import check_data
    from megalina.measure.check import as_json, busy, checked, overrides_of, table
    from megalina.validate import check_config, check_hardware

    configs = {name: config_of([*words, f"cluster={args.out.stem}"]) for name, words in overrides_of(ranks).items()}
    vocab_sizes = {}
    for name, config in configs.items():
        check_config(config, ranks)
        check_hardware(config.cluster)
        vocab_sizes[name] = check_data(config)
    found = run_ranks(spec_of("check", args, configs), ranks, member)
    if found is None:
        return 0
    rows = [checked(name, c, ranks, vocab_size=vocab_sizes[name], measured=found[name]) for name, c in configs.items()]
    print(f"{ranks} ranks, cluster={args.out.stem}; measured over {args.steps} steps of the trainer\n")
    print(table(rows))
    if disturbed := busy(rows):
        print(f"warning: something else had the cores, steps are no good: {', '.join(disturbed)}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(as_json(rows), indent=1, allow_nan=False) + "\n")
    return 0


def host(args: argparse.Namespace, ranks: int, member: "Member | None") -> int:
    """Steps of several schedules with a watch on every instruction."""
    from megalina.cli.train import check_data
    from megalina.measure.host_time import HostTime, overrides_of, table
    from megalina.validate import check_config

    configs = {name: config_of(words) for name, words in overrides_of(ranks).items()}
    for config in configs.values():
        check_config(config, ranks)
        check_data(config)
    found = run_ranks(spec_of("host", args, configs), ranks, member)
    if found is None:
        return 0
    print(f"{ranks} ranks, mean over ranks of medians over {args.steps} steps, ms of CPU time unless said otherwise\n")
    print(table({name: HostTime(**values) for name, values in found.items()}))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 0


def spec_of(what: str, args: argparse.Namespace, configs: "Mapping[str, PretrainConfig]") -> dict[str, Any]:
    """Of ranks that run these configurations."""
    from omegaconf import OmegaConf

    texts = {name: OmegaConf.to_yaml(OmegaConf.structured(config)) for name, config in configs.items()}
    return {"what": what, "device": device_kind(args.device), "seconds": args.seconds, "configs": texts, "steps": args.steps}


def config_of(overrides: Sequence[str]) -> "PretrainConfig":
    from megalina.compose import compose

    return compose(overrides)


def run_ranks(spec: Mapping[str, Any], ranks: int, member: "Member | None") -> dict[str, Any] | None:
    """What rank 0 found; None on the other ranks, where something else has started them."""
    from megalina import launch

    with tempfile.TemporaryDirectory(prefix="megalina_measure_") as folder:
        out, path = Path(folder) / "found.json", Path(folder) / "spec.json"
        whole = {**spec, "out": str(out)}
        if member is not None:
            from megalina.measure.worker import run

            os.environ.update(member.environment())
            run(whole)
            return dict(json.loads(out.read_text())) if member.rank == 0 else None
        path.write_text(json.dumps(whole))
        launch.run_ranks([sys.executable, "-m", "megalina.measure.worker", str(path)], ranks=ranks, logs=Path(folder) / "logs")
        return dict(json.loads(out.read_text()))


def parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, number, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=whole(1, 1_000_000), metavar="N", help="to start here (default: one for each GPU or core)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPUs where there are some")
    parser.add_argument("--out", type=Path, default=ROOT / FILE, metavar="YAML",
                        help=f"the cluster's file (default: {FILE}); with --check the one that forecasts read")  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=number(0, 1e6, above=True),
        default=SECONDS,
        metavar="S",
        help=f"for each of some 80 things that are timed, twice (default: {SECONDS:g})",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="measure nothing; run three small configurations and compare")
    modes.add_argument(
        "--host", action="store_true", help="where a host's time goes in a step: blocks, router, update, wire, loop"
    )
    parser.add_argument(
        "--steps", type=whole(1, 1_000_000), default=STEPS, metavar="N", help=f"of --check and --host, of each (default: {STEPS})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all times and figures")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
