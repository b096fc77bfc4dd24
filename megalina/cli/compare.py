"""Compare strategies: how fast is a training step under each, on links of a given rate?

python tools/compare_strategies.py [OVERRIDES] [--suite ladder] [--nodes N --ranks-per-node N --link-mbit X] [--strategies A,B]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.compare.ladder import Setting
    from megalina.config import ClusterConfig, PretrainConfig

ROOT = Path(__file__).resolve().parents[2]  # where ranks find megalina
FAILED, BAD_INPUT = 1, 2  # exit codes
SHOWN = ("eager", "flow")  # in the picture, one step of each
TO_THE_END = ("ddp", "auto")  # take all turns, however slow: ratios are to them, or theirs count


@dataclass(frozen=True, slots=True)
class Job:
    """One setting, checked and ready to run."""

    setting: "Setting"
    configs: "Mapping[str, PretrainConfig]"  # by the name of the strategy
    link_mbit: float  # 0: no emulated links, all ranks of this machine's loopback; in slow motion the slower rate


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    from megalina.explain import explain
    from megalina.launch import Stopped
    from megalina.namespaces import CannotEmulate

    try:
        jobs = jobs_of(args)
        with tempfile.TemporaryDirectory(prefix="megalina_compare_") as folder:
            found = [run(job, args, Path(folder), first=i == 0) for i, job in enumerate(jobs)]
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except (RanksFailed, CannotEmulate) as error:
        print(error, file=sys.stderr)
        return FAILED if isinstance(error, RanksFailed) else BAD_INPUT
    except Exception as error:
        if not _is_input(error):
            raise
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    from megalina.compare.report import closing, draw_bars, draw_slowdowns, table, whole

    result = whole(found, note=note(jobs[0]))
    text = "\n\n".join([*map(table, found), closing(result)])
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        draw_bars(args.plot, result)
    if args.slowdowns:
        draw_slowdowns(args.slowdowns, result)
    return 0


def exit_code(benchmark: "Callable[[], object]") -> int:
    """Of a benchmark that runs jobs: 0, or what went wrong in a line."""
    from megalina.launch import RankFailed, Stopped
    from megalina.namespaces import CannotEmulate

    try:
        benchmark()
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except (RanksFailed, RankFailed, CannotEmulate, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return FAILED if isinstance(error, (RanksFailed, RankFailed)) else BAD_INPUT
    return 0


class RanksFailed(RuntimeError):
    """A rank ended badly; the message has its last lines."""


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Everything is checked before a rank starts; ValueError, or an error of Hydra, for bad input."""
    from megalina.compare.ladder import LADDER, LINK_MBIT, Setting
    from megalina.namespaces import check_figures, check_host

    for path in filter(None, (args.json, args.plot, args.slowdowns, args.picture, args.trace, args.markdown)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    check_figures(rounds=args.rounds, steps=args.steps, nodes=args.nodes, ranks_per_node=args.ranks_per_node)
    if args.slow_motion is not None:
        check_figures(slow_motion=args.slow_motion)
    variants = variants_of(args.variant)
    named = (*(args.strategies.split(",") if args.strategies else ()), *variants)
    own = Setting(f"{args.nodes}x{args.ranks_per_node}", args.nodes, args.ranks_per_node, (), args.slow_motion or 1.0)
    link_mbit = LINK_MBIT if args.link_mbit is None else args.link_mbit
    only = args.only.split(",") if args.only else []
    if only and not args.suite:
        raise ValueError(f"--only {args.only} chooses from a suite: give --suite ladder too")
    if unknown := [name for name in only if name not in {s.name for s in LADDER}]:
        raise ValueError(f"--only {','.join(unknown)}: the ladder has {', '.join(s.name for s in LADDER)}")
    settings: Sequence[Setting] = [s for s in LADDER if not only or s.name in only] if args.suite else [own]
    if args.slow_motion is not None:
        settings = [replace(s, slow_motion=args.slow_motion) for s in settings]
    if args.link_mbit is not None and all(s.nodes == 1 for s in settings):
        raise ValueError(f"--link-mbit {args.link_mbit:g}: one node has no link; leave it out, or give --nodes 2 or more")
    if any(s.nodes > 1 for s in settings):
        check_figures(link_mbit=link_mbit)
        check_host()
    jobs = []
    for setting in settings:
        base = setting.all_overrides() if args.suite or not args.overrides else (f"parallel.ep={setting.world}",)
        names = named or setting.strategies
        if "eager" not in names:
            names = ("eager", *names)  # what all ratios are to
        jobs.append(job_of(setting, names, variants=variants, base=base, link_mbit=link_mbit, overrides=args.overrides))
    return jobs


def job_of(
    setting: "Setting",
    names: Sequence[str],
    *,
    variants: Mapping[str, Sequence[str]],
    base: Sequence[str],
    link_mbit: float,
    overrides: Sequence[str] = (),
) -> Job:
    """A setting and those who compete in it: by name a strategy's YAML, or one of `variants`, of which each is some overrides;
    eager with each of its pieces.  `base` comes before a competitor's own overrides, `overrides` after them."""
    from megalina.compare.ladder import EAGER_PIECES

    configs = {}
    for name in names:
        for piece in EAGER_PIECES if name == "eager" else (None,):
            title = name if piece is None else f"eager {piece // 1024} KiB" if piece else "eager whole"
            configs[title] = _config(setting, name, piece, variants=variants, base=base, overrides=overrides)
    return Job(setting, configs, link_mbit / setting.slow_motion if setting.nodes > 1 else 0.0)


def variants_of(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Overrides by name, from NAME:OVERRIDE,OVERRIDE; ValueError for what isn't that."""
    out = {}
    for text in given:
        name, colon, overrides = text.partition(":")
        if not (name and colon and all("=" in override for override in overrides.split(","))):
            raise ValueError(f"--variant {text} must be NAME:OVERRIDE,OVERRIDE, such as packed:strategy=flow,strategy.packing=2")
        out[name] = tuple(overrides.split(","))
    return out


def _config(
    setting: "Setting",
    name: str,
    piece: int | None,
    *,
    variants: Mapping[str, Sequence[str]],
    base: Sequence[str],
    overrides: Sequence[str],
) -> "PretrainConfig":
    from megalina.compare.ladder import OVERRIDES, with_partners
    from megalina.compose import compose
    from megalina.parallel.plan_file import with_plan
    from megalina.perfmodel.forecast.partition import with_partition
    from megalina.validate import check_config

    own: Sequence[str] = variants.get(name) or OVERRIDES.get(name) or (f"strategy={name}",)
    words = [
        *base,
        *own,
        *([f"strategy.partition_bytes={piece}"] if piece is not None else []),
        *overrides,
        f"launch.ranks={setting.world}",
        "guard.spike=none",
    ]
    config = with_partners(with_plan(compose(words), setting.world), setting.world)
    config = with_partition(replace(config, cluster=slowed(config.cluster, setting.slow_motion)), setting.world)
    check_config(config, setting.world)
    return config


def slowed(cluster: "ClusterConfig", factor: float) -> "ClusterConfig":
    """The same devices and links in slow motion; ValueError where no devices are emulated."""
    if factor != 1.0 and not (cluster.attention_ms or cluster.experts_ms or cluster.device_gflops):
        raise ValueError(f"--slow-motion {factor:g} slows emulated devices: give cluster.attention_ms and cluster.experts_ms")
    return replace(
        cluster,
        attention_ms=cluster.attention_ms * factor,
        experts_ms=cluster.experts_ms * factor,
        kernel_floor_ms=cluster.kernel_floor_ms * factor,
        device_gflops=cluster.device_gflops / factor,
        link_gbit=cluster.link_gbit / factor,
        latency_us=cluster.latency_us * factor,
    )


def run(
    job: Job, args: argparse.Namespace, folder: Path, *, first: bool, to_the_end: Sequence[str] = TO_THE_END
) -> dict[str, Any]:
    """Runs a setting's strategies in turns on its own cluster; returns what rank 0 found.  `to_the_end`: who takes all turns."""
    from omegaconf import OmegaConf

    from megalina import launch
    from megalina.cli.train import check_data
    from megalina.namespaces import emulated_cluster

    setting = job.setting
    check_data(next(iter(job.configs.values())))
    out, spec = folder / f"{setting.name}.json", folder / f"{setting.name}.spec.json"
    configs = {
        name: OmegaConf.to_yaml(OmegaConf.structured(replace(c, run=replace(c.run, dir=str(folder / "run")))))
        for name, c in job.configs.items()
    }
    content = {
        "name": setting.name,
        "configs": configs,
        "rounds": args.rounds,
        "turn": args.steps,
        "to_the_end": to_the_end,
        "ranks_per_node": setting.ranks_per_node,
        "link_mbit": job.link_mbit,
        "slow_motion": setting.slow_motion,
        "out": str(out),
        "picture": str(args.picture.absolute()) if args.picture and first else "",
        "trace": str(args.trace.absolute()) if args.trace and first else "",
        "shown": SHOWN,
        "note": note(job),
    }
    spec.write_text(json.dumps(content))
    command = [sys.executable, "-m", "megalina.compare.worker", str(spec)]
    env, logs = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, folder / "logs"
    if setting.nodes == 1:
        try:
            launch.run_ranks(command, ranks=setting.world, logs=logs)
        except launch.RankFailed as error:
            raise RanksFailed(f"{setting.name}: {error}") from error
    else:
        with emulated_cluster(nodes=setting.nodes, link_mbit=job.link_mbit) as cluster:
            outcome = cluster.run(command, ranks_per_node=setting.ranks_per_node, logs=logs, env=env)
        if outcome.code:
            raise RanksFailed(f"{setting.name}: {outcome.reason}")
    return dict(json.loads(out.read_text()))


def note(job: Job) -> str:
    """What of the cluster is emulated."""
    cluster = next(iter(job.configs.values())).cluster
    devices = "devices" if cluster.device_gflops or cluster.attention_ms else ""
    links = f"links of {job.link_mbit * job.setting.slow_motion:g} Mbit/s" if job.link_mbit else ""
    if devices or links:
        return f"emulated: {' and '.join(filter(None, (devices, links)))}"
    return "nothing is emulated: ranks share this machine"


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, number, whole

    parser = Parser(
        description="Trains the same model on the same data under several strategies, which take turns step by step in one job: "
        "step times, their ratios to tuned eager, times that devices wait, slowdown of all-to-alls, and what no schedule could "
        "beat.  Nodes are emulated (root, iproute2); the trainer, its math and its losses are real.",
        epilog="examples:\n  tools/compare_strategies.py --suite ladder --slow-motion 6 --json ladder.json"
        "   (three hours, on an idle machine)\n"
        '  tools/compare_strategies.py --suite ladder --only "4x1 heavy" --slow-motion 3 --strategies flow,auto'
        "   (10 minutes)\n"
        "  tools/compare_strategies.py --nodes 2 --ranks-per-node 2 --link-mbit 300 --strategies flow,auto model=laptop "
        "parallel.ep=4 cluster.attention_ms=8 cluster.experts_ms=12",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py; without --suite the "
                        "ladder's model unless you give overrides")  # fmt: skip
    parser.add_argument(
        "--suite", choices=("ladder",), help="six settings: 4x1 and 4x2, light and heavy dense gradients, or fine-grained experts"
    )
    parser.add_argument("--only", default="", metavar="A,B", help='of the suite, such as "4x1 light,4x2 light"')
    parser.add_argument(
        "--nodes", type=whole(1, 254), default=4, metavar="N", help="without --suite (default: 4); 1: no emulated link"
    )
    parser.add_argument("--ranks-per-node", type=whole(1, 1024), default=1, metavar="N", help="without --suite (default: 1)")
    parser.add_argument("--link-mbit", type=number(above=True), metavar="X", help="of each node, each way (default: 500)")
    parser.add_argument(
        "--slow-motion",
        type=number(0, 1e6, above=True),
        metavar="F",
        help="links and devices slower by this factor, figures divided "
        "by it, so that more ranks' real math fits in (default: 2 for the suite's 4x2, else 1)",
    )
    parser.add_argument("--strategies", default="", metavar="A,B", help="default: all; eager always runs")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:A=B,C=D",
                        help="one more competitor, with these overrides; may be given several times")  # fmt: skip
    parser.add_argument(
        "--rounds", type=whole(1, 1_000_000), default=3, metavar="N", help="turns of each strategy, of slow ones 1 (default: 3)"
    )
    parser.add_argument(
        "--steps", type=whole(1, 1_000_000), default=2, metavar="N", help="timed steps a turn, after one that isn't (default: 2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="step times as bars; .svg too")
    parser.add_argument("--slowdowns", type=Path, metavar="PNG", help="how much gradients slow all-to-alls, as a distribution")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the timeline of a step of eager and of flow, first setting")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the same steps, of all ranks, for ui.perfetto.dev: .json.gz")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables, for a log")
    return parser


def _is_input(error: Exception) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, (ValueError, OSError, HydraException, OmegaConfBaseException))


if __name__ == "__main__":
    from megalina.console import command

    command(main)
