"""Other frameworks beside megalina: the same model, bytes, emulated devices and links, step times in turns in one job.

    .venv/bin/pip install -e '.[peers]' -c requirements.lock                                 (the peers, which nothing else needs)
    sudo .venv/bin/python benchmarks/peers.py --json peers.json --picture peers.png          (root, iproute2)
    sudo .venv/bin/python benchmarks/peers.py --only "4x1 light" --speeds slow               (one setting)
    .venv/bin/python benchmarks/peers.py --redraw results/peers_*.json --picture peers.png   (from files that were made before)

Each peer's mixture of experts trains the ladder's model (conf/experiment/ladder.yaml) as its users would run it, and tuned:
bucket sizes, overlap; the fastest variant counts.  Tokens that don't fit into an expert's even share are dropped by the peers'
gates, and chosen evenly by ours, so all send as many rows.  Peers' devices hide what the host does under the next block.
Each setting runs in slow motion, in which schedules are compared and not hosts, and at natural speed.

Schedules of systems that can't run here are lists of ours ("re-expressed"): same math, wire and devices, another order.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.compare.ladder import Setting

ROOT = Path(__file__).resolve().parent.parent
SLOW_MOTION = {4: 3.0, 8: 6.0}  # by ranks
SPEEDS = ("slow", "natural")
LISTS = {  # name of the row -> overrides, what they re-express
    "megalina": (("strategy=auto",), ""),
    "pairing": (("strategy=pair",), "Megatron-Core's combined 1F1B"),
    "chunks": (("strategy=lina_nopack", "strategy.yields=false"), "Tutel's and FasterMoE's chunks"),
    "parts": (("strategy=flow",), "FlowMoE and two-batch overlap"),
    "weights": (("strategy=lancet",), "Lancet"),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from megalina.cli.compare import exit_code

    def run() -> None:
        settings = [setting for path in args.redraw for setting in settings_in(path)] or measured(args)
        from benchmarks.peering.report import closing, draw, table

        print("\n\n".join([*map(table, settings), closing(settings)]))
        if args.json:
            args.json.write_text(json.dumps({"settings": settings}, indent=1, allow_nan=False) + "\n")
        if args.picture:
            draw(args.picture, settings)

    return exit_code(run)


def settings_in(path: Path) -> list[dict[str, Any]]:
    """Of a file that --json or benchmarks/results_page.py wrote; ValueError for another one."""
    found = json.loads(path.read_text())
    settings = found.get("result", found).get("settings") if isinstance(found, dict) else None
    if not settings or any("rows" not in setting or "not_run" not in setting for setting in settings):
        raise ValueError(f"{path} has no settings with rows: give what --json wrote")
    return list(settings)


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each setting at each speed.  Everything is checked before a rank starts."""
    from megalina.compare.ladder import LADDER
    from megalina.namespaces import check_host

    only = args.only.split(",") if args.only else [s.name for s in LADDER]
    if unknown := [name for name in only if name not in {s.name for s in LADDER}]:
        raise ValueError(f"--only {','.join(unknown)}: the ladder has {', '.join(s.name for s in LADDER)}")
    lists = ["megalina", *(name for name in args.lists.split(",") if name and name != "megalina")]
    for option, words, known in (("speeds", args.speeds.split(","), SPEEDS), ("lists", lists, LISTS)):
        if wrong := [word for word in words if word not in known]:
            raise ValueError(f"--{option} {','.join(wrong)}: choose of {', '.join(known)}")
    check_host()
    out = []
    with tempfile.TemporaryDirectory(prefix="megalina_peers_") as folder:
        for setting in (s for s in LADDER if s.name in only):
            for speed in args.speeds.split(","):
                factor = SLOW_MOTION[setting.world] if speed == "slow" else 1.0
                out.append(run_setting(replace(setting, slow_motion=factor), lists, args, Path(folder)))
    return out


def run_setting(setting: "Setting", lists: Sequence[str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from benchmarks.peering.model import check_model
    from benchmarks.peering.report import rows_of
    from benchmarks.peering.systems import NOT_RUN, PEERS, variants_of
    from megalina.cli.compare import RanksFailed, job_of
    from megalina.cli.train import check_data
    from megalina.compare.ladder import LINK_MBIT
    from megalina.namespaces import emulated_cluster

    variants = {name: LISTS[name][0] for name in lists}
    job = job_of(setting, list(variants), variants=variants, base=setting.all_overrides(), link_mbit=LINK_MBIT)
    first = next(iter(job.configs.values()))
    check_model(first)
    check_data(first)
    left_out = {peer.name: peer.left_out(first) for peer in PEERS}
    peers = [peer for peer in PEERS if not left_out[peer.name]]
    texts = {
        name: OmegaConf.to_yaml(OmegaConf.structured(replace(c, run=replace(c.run, dir=str(folder / "run")))))
        for name, c in job.configs.items()
    }
    title = f"{setting.name} {setting.slow_motion:g}"
    out, path = folder / f"{title}.json", folder / f"{title}.spec.json"
    spec = {
        "ours": texts, "peer": texts["megalina"], "peers": [peer.name for peer in peers],
        "packages": sorted({package for peer in peers for package in peer.packages}),
        "rounds": args.rounds, "turn": args.steps, "timeout_s": 300, "out": str(out),
    }  # fmt: skip
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "benchmarks.peering.turns", str(path)]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    print(f"{setting.name}, {setting.slow_motion:g} times in slow motion", file=sys.stderr)
    with emulated_cluster(nodes=setting.nodes, link_mbit=job.link_mbit) as cluster:
        outcome = cluster.run(command, ranks_per_node=setting.ranks_per_node, logs=folder / f"{title} logs", env=env)
    if outcome.code:
        raise RanksFailed(f"{title}: {outcome.reason}")
    by_peer = {peer.name: [name for name, *_ in variants_of([peer])] for peer in peers}
    rows = rows_of(
        json.loads(out.read_text()), by_peer, {name: LISTS[name][1] for name in lists}, slow_motion=setting.slow_motion
    )
    not_run = {name: why for name, why in left_out.items() if why} | NOT_RUN
    return {"name": setting.name, "slow_motion": setting.slow_motion, "rows": rows, "not_run": not_run}


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="A,B", help='settings of the ladder, such as "4x1 light" (default: all)')
    parser.add_argument("--speeds", default=",".join(SPEEDS), metavar="A,B", help=f"of {','.join(SPEEDS)} (default: both)")
    parser.add_argument("--lists", default=",".join(LISTS), metavar="A,B", help=f"of ours (default: {','.join(LISTS)})")
    parser.add_argument("--rounds", type=whole(1, 1_000_000), default=3, metavar="N", help="turns of each (default: 3)")
    parser.add_argument("--steps", type=whole(1, 1_000_000), default=2, metavar="N", help="timed steps a turn (default: 2)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all numbers")
    parser.add_argument(
        "--redraw",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="measure nothing: tables and picture of what --json wrote",
    )
    parser.add_argument("--picture", type=new_file, metavar="PNG", help="step times as bars; .svg too")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from megalina.console import command

    command(main)
