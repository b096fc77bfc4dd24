"""Emulate a cluster on one machine: run a command once per rank, on nodes that are joined by slow links.

python tools/emulate_cluster.py --nodes N --ranks-per-node N --link-mbit X -- COMMAND
"""

import argparse
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megalina.arguments import Parser, number, whole
from megalina.launch import Stopped, num_cores
from megalina.namespaces import CannotEmulate, Cluster, NoLatency, check_figures, emulated_cluster
from megalina.nearest import nearest
from megalina.node_ranks import check_command

CLUSTERS = Path(__file__).resolve().parent.parent / "conf" / "cluster"
BAD_INPUT = 2  # exit code
LINK_MBIT = 500.0  # a core moves this much over TCP with little effort
# Share of a device's peak that a training step reaches: Megatron-LM's larger models reach 44% to 52% of an A100's
# (Narayanan et al. 2021, table 1), MoE layers with smaller matrix products less.
EFFICIENCY = 0.4
CORE_GFLOPS = 50.0  # what float32 products reach on one core, roughly; for a warning
OVERRIDDEN = ("pretrain_gpt_moe.py", "analyze_alltoall.py")  # what takes Hydra's overrides and runs as one of several ranks
DESCRIPTION = """\
Runs COMMAND once per rank on an emulated cluster: a network namespace a node, and between the nodes a switch and links of
limited rate, each way. Ranks of one node talk through its loopback, which is not limited. Ranks find each other as under
torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...), so what runs there runs here. Needs Linux, root and iproute2.

Rank 0 writes here, the others to files, of which a failing rank's end is shown. The first failure ends all ranks. Nothing is
left behind: no process, no namespace (after kill -9 of this tool, the next start removes them)."""
EPILOG = """\
examples:
  # expert-parallel training on 4 nodes with links of 500 Mbit/s
  sudo .venv/bin/python tools/emulate_cluster.py -- .venv/bin/python pretrain_gpt_moe.py model=tiny parallel.ep=4
  # 2 nodes x 2 ranks, slower links, half an hour at most
  sudo .venv/bin/python tools/emulate_cluster.py --nodes 2 --ranks-per-node 2 --link-mbit 100 --timeout-s 1800 -- COMMAND
  # without a slow link, for comparison: one node
  sudo .venv/bin/python tools/emulate_cluster.py --nodes 1 --ranks-per-node 4 -- COMMAND
  # the testbed of the Lina paper, 200 times slower: 100 Gbit/s become 500 Mbit/s, and devices are slowed alike
  sudo .venv/bin/python tools/emulate_cluster.py --like lina_testbed -- .venv/bin/python pretrain_gpt_moe.py parallel.ep=16

slow motion (--like NAME):
  The figures of conf/cluster/NAME.yaml, slowed by one factor: link rates and device speed are divided by it, latency is
  multiplied. So all times are dilated by the factor, and their ratios (which strategy wins, and by how much) stay. Ranks see
  it as MEGALINA_SLOWDOWN, and the links' rate as MEGALINA_LINK_MBIT, and say so on their figures. pretrain_gpt_moe.py and
  tools/analyze_alltoall.py get cluster.peak_tflops, the device's peak, slowed, and cluster.device_gflops, 40% of it, unless
  COMMAND gives them or the device's times. Time-outs are not dilated: see hang.timeout_s and cluster.timeout_s.

exit code: 0, the code of the first rank that failed (128 + N: ended by signal N), 124 after --timeout-s, 2 for bad input or
a machine that lacks something, which one line names."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is emulated."""

    nodes: int = 4
    ranks_per_node: int = 1
    link_mbit: float = LINK_MBIT
    latency_us: float = 0.0
    slowdown: float = 1.0  # against the cluster it is like
    peak_gflops: float = 0.0  # of an emulated device; 0: none is emulated

    @property
    def device_gflops(self) -> float:
        """What a training step reaches of the peak."""
        return self.peak_gflops * EFFICIENCY

    def __str__(self) -> str:
        latency = f", {self.latency_us:g} us one way" if self.latency_us else ""
        return f"{self.nodes} x {self.ranks_per_node} ranks; links of {self.link_mbit:g} Mbit/s each way{latency}"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, command = _parser().parse_args(words[:end]), words[end + 1 :]
    try:
        setting = asked(args)
        if not command:
            raise ValueError("there is no command: give it after --, as in: --nodes 4 -- python pretrain_gpt_moe.py")
        check_command(command)
        return _run(setting, command, args)
    except (ValueError, CannotEmulate, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum


def asked(args: argparse.Namespace) -> Setting:
    """What the flags ask for; ValueError for those that don't go together."""
    if args.like and args.link_mbit is not None:
        raise ValueError("--link-mbit follows from --like: choose it by --slowdown")
    if args.slowdown is not None and not args.like:
        raise ValueError("--slowdown says how much slower than a real cluster the emulated one is: name it by --like")
    setting = slow_motion(args.like, args.slowdown) if args.like else Setting()
    given = {name: getattr(args, name) for name in ("nodes", "ranks_per_node", "link_mbit", "latency_us")}
    setting = replace(setting, **{name: value for name, value in given.items() if value is not None})
    check_figures(ranks_per_node=setting.ranks_per_node, timeout_s=args.timeout_s)  # the others are the cluster's to check
    return setting


def slow_motion(name: str, factor: float | None = None) -> Setting:
    """The cluster of conf/cluster/NAME.yaml, slowed by `factor`; None: so much that a link has LINK_MBIT."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CLUSTERS.glob("*.yaml"))}
    known = {stem: figures for stem, figures in files.items() if figures.get("nodes") and figures.get("link_gbit")}
    if name not in known:
        why = "gives no nodes and links" if name in files else f"does not exist{nearest(name, known)}"
        raise ValueError(f"--like {name}: conf/cluster/{name}.yaml {why}; there is {', '.join(known)}")
    figures = known[name]
    link_mbit, peak_gflops = figures["link_gbit"] * 1000, figures["peak_tflops"] * 1000
    if factor is None:
        factor = link_mbit / LINK_MBIT
    check_figures(slowdown=factor)
    return Setting(
        figures["nodes"],
        figures["ranks_per_node"],
        link_mbit=link_mbit / factor,
        latency_us=figures["latency_us"] * factor,
        slowdown=factor,
        peak_gflops=peak_gflops / factor,
    )


def with_device(command: Sequence[str], setting: Setting) -> list[str]:
    """The command, with the emulated device's figures if it takes them and doesn't say them itself."""
    if not setting.peak_gflops or not any(Path(word).name in OVERRIDDEN for word in command):
        return list(command)
    given = dict(word.lstrip("+").split("=", 1) for word in command if "=" in word)
    own_device = any(given.get(f"cluster.{key}", "0") != "0" for key in ("device_gflops", "attention_ms", "experts_ms"))
    wanted = {"cluster.peak_tflops": setting.peak_gflops / 1000}
    if not own_device:
        wanted["cluster.device_gflops"] = setting.device_gflops
    return [*command, *(f"{key}={value:g}" for key, value in wanted.items() if key not in given)]


def too_fast(setting: Setting) -> str:
    """A warning if this machine's cores can't do the real math in the time of the emulated devices; else nothing."""
    ranks, cores = setting.nodes * setting.ranks_per_node, num_cores()
    share = ranks * setting.device_gflops / (cores * CORE_GFLOPS)
    if share <= 1:
        return ""
    return (
        f"{ranks} devices of {setting.device_gflops:g} GFLOP/s on {cores} cores of about {CORE_GFLOPS:g}: math that fills "
        f"them takes longer here than there, and times are wrong then; --slowdown {setting.slowdown * share:.3g} has room for it"
    )


def _run(setting: Setting, command: Sequence[str], args: argparse.Namespace) -> int:
    logs = args.logs or Path(tempfile.gettempdir()) / f"megalina_ranks_{secrets.token_hex(4)}"
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(_cluster(setting))
        except NoLatency as error:
            if args.latency_us is not None:
                raise
            _say(f"warning: without the {setting.latency_us:g} us of latency of {args.like}: {error}")
            setting = replace(setting, latency_us=0.0)
            cluster = stack.enter_context(_cluster(setting))
        for warning in cluster.warnings:
            _say(f"warning: {warning}")
        _say(str(setting))
        env = {"MEGALINA_LINK_MBIT": f"{setting.link_mbit:g}"} if setting.nodes > 1 else {}
        figures = with_device(command, setting)[len(command) :]
        if args.like:
            env["MEGALINA_SLOWDOWN"] = f"{setting.slowdown:g}"
            _say(
                f"{args.like} in slow motion: all times are dilated by {setting.slowdown:g}, their ratios stay; a device has "
                f"{setting.device_gflops:g} GFLOP/s ({EFFICIENCY:.0%} of its peak, slowed) if the command emulates one"
            )
            if any("device_gflops" in figure for figure in figures) and (warning := too_fast(setting)):
                _say(f"warning: {warning}")
        outcome = cluster.run(
            [*command, *figures], ranks_per_node=setting.ranks_per_node, logs=logs, env=env, timeout_s=args.timeout_s
        )
    if outcome.code == 0 and not args.logs:
        shutil.rmtree(logs)
    elif outcome.code:
        _say(f"{outcome.reason}\nall ranks were ended; the output of ranks other than 0 is in {logs}")
    return outcome.code


def _cluster(setting: Setting) -> AbstractContextManager[Cluster]:
    return emulated_cluster(nodes=setting.nodes, link_mbit=setting.link_mbit, latency_us=setting.latency_us)


def _say(line: str) -> None:
    """Rank 0's output alone goes to stdout."""
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        usage="%(prog)s [--nodes N] [--ranks-per-node N] [--link-mbit X | --like NAME [--slowdown F]] [--latency-us X]\n"
        "                          [--timeout-s X] [--logs FOLDER] -- COMMAND",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=whole(1, 254), metavar="N", help="default: 4, or as the cluster of --like has")
    parser.add_argument("--ranks-per-node", type=whole(1, 1024), metavar="N", help="default: 1, or as the cluster of --like has")
    parser.add_argument(
        "--link-mbit", type=number(above=True), metavar="X", help="Mbit/s of each node's link, each way (default: 500)"
    )
    parser.add_argument(
        "--latency-us", type=number(0, 1e9), metavar="X", help="added to each packet's way, microseconds (default: 0)"
    )
    parser.add_argument("--like", metavar="NAME", help="a cluster of conf/cluster in slow motion: lina_testbed")
    parser.add_argument(
        "--slowdown", type=number(above=True), metavar="F", help="the factor of --like (default: makes links of 500 Mbit/s)"
    )
    parser.add_argument(
        "--timeout-s", type=number(0, 1e9, above=True), metavar="X", default=1e9, help="end all after this many seconds"
    )
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER",
        help="what ranks 1, 2, ... write goes to FOLDER/rank_N.log (default: a temporary folder, kept if a rank fails)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
