"""What LocMoE's routers save: steps in turns on 2 nodes x 2 ranks with slow links, bytes, and losses at equal steps.

    sudo python benchmarks/locmoe.py --json locmoe.json         (some 10 minutes on 2 cores; root, iproute2)
    sudo python benchmarks/locmoe.py --rounds 1 --steps 1 --train-steps 4 --data alike
    python benchmarks/locmoe.py --parts train                   (needs no root: nodes are declared, not emulated)

Parts: train (real math, no emulated link: validation loss, load entropy, drops, bytes after equal steps, with several weights of
the locality loss; by how much an order of experts from a profile keeps more choices at home), time (step times in turns, devices
and links emulated, from what was trained; bytes of tokens as counted, and what the links' counters say of the same exchanges
alone), few (more nodes than experts, where there can be no home).  The last line is JSON with all of it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
NODES, RANKS_PER_NODE, EXPERTS = 2, 2, 8
FEW_NODES, FEW_EXPERTS = 4, 2
WIRED = ("hash", "locmoe mu=0.1")  # whose exchanges are repeated alone
PLACED = "switch"
PARTS = ("train", "time", "few")

if TYPE_CHECKING:
    from megalina.config import PretrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from megalina.cli.compare import exit_code

    return exit_code(lambda: compare_routers(args))


def compare_routers(args: argparse.Namespace) -> None:
    from benchmarks.locality.report import report

    with tempfile.TemporaryDirectory(prefix="megalina_locmoe_") as folder:
        found = measured(args, Path(folder))
    for of in found.get("trained", {}).values():
        del of["checkpoint"]  # which is gone
    print(report(found))
    line = json.dumps(found, allow_nan=False)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts that were asked for.  Every configuration is checked before a rank starts."""
    from benchmarks.locality.cases import FEW, ROUTERS, TRAINED, config_of, words_of
    from megalina.cli.train import check_data

    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts {args.parts}: {unknown[0]} is none of {', '.join(PARTS)}")
    if args.eval_sequences % 16:
        raise ValueError(f"--eval-sequences {args.eval_sequences}: ranks evaluate 16 at a time, give a multiple")
    place = {"nodes": NODES, "ranks_per_node": RANKS_PER_NODE, "experts": EXPERTS, "ep": NODES * RANKS_PER_NODE, "homes": NODES}
    timed = {name: config_of(words, data=args.data, **place) for name, words in ROUTERS.items()}
    trained = {name: config_of(words_of(name), data=args.data, real=True, **place) for name in TRAINED}
    # a profile is of routing without drops
    trained[PLACED] = replace(trained[PLACED], router=replace(trained[PLACED].router, capacity_factor=0.0))
    few = {"nodes": FEW_NODES, "ranks_per_node": 1, "experts": FEW_EXPERTS, "ep": FEW_EXPERTS, "homes": 0}
    few_timed = {name: config_of(words_of(name), data=args.data, **few) for name in FEW}
    check_data(next(iter(timed.values())))
    turns = {"job": "timed", "rounds": args.rounds, "turn": args.steps, "repeats": args.repeats, "starts": {}}
    found: dict[str, Any] = {
        "nodes": NODES, "ranks_per_node": RANKS_PER_NODE, "link_mbit": args.link_mbit, "data": args.data,
        "rounds": args.rounds, "steps": args.steps, "train_steps": args.train_steps,
    }  # fmt: skip
    if "train" in parts:
        spec = {
            "job": "trained", "title": "train", "steps": args.train_steps, "eval_sequences": args.eval_sequences,
            "placed": PLACED, "ranks_per_node": RANKS_PER_NODE,
        }  # fmt: skip
        found["trained"] = _run(spec, trained, folder, nodes=1, link_mbit=0.0)
    if "time" in parts:
        starts = {name: of["checkpoint"] for name, of in found.get("trained", {}).items()}
        spec = {**turns, "starts": starts, "title": "time", "wired": WIRED, "ranks_per_node": RANKS_PER_NODE}
        found["timed"] = _run(spec, timed, folder, nodes=NODES, link_mbit=args.link_mbit)
    if "few" in parts:
        try:
            config_of(words_of("locmoe mu=0.1"), data=args.data, **(few | {"homes": FEW_NODES}))
            refused = "not refused"
        except ValueError as error:
            refused = f"refused: {error}"
        spec = {**turns, "title": "few experts", "wired": (), "ranks_per_node": 1}
        ran = _run(spec, few_timed, folder, nodes=FEW_NODES, link_mbit=args.link_mbit)
        found["few"] = {"nodes": FEW_NODES, "experts": FEW_EXPERTS, "refused": refused, "timed": ran}
    return found


def _run(
    spec: Mapping[str, Any], configs: "Mapping[str, PretrainConfig]", folder: Path, *, nodes: int, link_mbit: float
) -> dict[str, Any]:
    """On a cluster of its own, or on one node without."""
    from omegaconf import OmegaConf

    from megalina import launch
    from megalina.cli.compare import RanksFailed
    from megalina.namespaces import emulated_cluster

    out, path = folder / f"{spec['title']}.json", folder / f"{spec['title']}.spec.json"
    texts = {}
    for number, (name, config) in enumerate(configs.items()):
        run = replace(config.run, dir=str(folder / f"{spec['title']} runs" / str(number)))
        texts[name] = OmegaConf.to_yaml(OmegaConf.structured(replace(config, run=run)))
    path.write_text(json.dumps({**spec, "configs": texts, "out": str(out)}))
    command, logs = (
        [sys.executable, str(ROOT / "benchmarks" / "locality" / "worker.py"), str(path)],
        folder / f"{spec['title']} logs",
    )
    if nodes == 1:
        launch.run_ranks(command, ranks=NODES * RANKS_PER_NODE, logs=logs)
    else:
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with emulated_cluster(nodes=nodes, link_mbit=link_mbit) as cluster:
            outcome = cluster.run(command, ranks_per_node=spec["ranks_per_node"], logs=logs, env=env)
        if outcome.code:
            raise RanksFailed(f"{spec['title']}: {outcome.reason}")
    return dict(json.loads(out.read_text()))


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, number, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = whole(1, 10**6)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--data",
        choices=("apart", "alike"),
        default="apart",
        help="each node has text of a kind of its own, or all have the same (default: apart)",
    )
    parser.add_argument("--link-mbit", type=number(above=True), default=100.0, metavar="X", help="of each node (default: 100)")
    parser.add_argument("--rounds", type=count, default=4, metavar="N", help="turns of each router (default: 4)")
    parser.add_argument("--steps", type=count, default=4, metavar="N", help="timed steps a turn (default: 4)")
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="of a step's exchanges alone (default: 5)")
    parser.add_argument("--train-steps", type=count, default=150, metavar="N", help="equal steps (default: 150)")
    parser.add_argument("--eval-sequences", type=count, default=128, metavar="N", help="multiple of 16 (default: 128)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="the last line, as a file")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from megalina.console import command

    command(main)
