"""Torch's pipeline schedules as a peer: their tables checked, run on our ranks, and timed beside torch's own runs on gloo.

    sudo python benchmarks/torch_pipelines.py --json torch.json --picture torch.png      (some 20 minutes; root, iproute2)
    python benchmarks/torch_pipelines.py --link-mbit 0 --ranks 2 --rounds 1              (a first look, which needs no root)
    python benchmarks/torch_pipelines.py --parts tables,exact                            (no times)

Of each of torch's five schedules: what the check of lists says of its table; gradients of the legal tables on our ranks, and
of torch's own run, against one process in float64; then step times and waits for messages.  Both sides train the same model
(the same layers, torch's as plain modules, the same weights and micro-batches) in one job and take turns.  Torch has the better
one of its two ways to place receives, where both give right gradients.

Devices are emulated, the same on both sides (docs/cluster.md), and each rank is a node behind a slow link, or all share this
machine (`--link-mbit 0`).  With `--real-math` a step takes what its math takes here: then give no more ranks than cores.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.config import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tables", "exact", "times")
LINK_MBIT = 500.0
LAYERS = 8  # so that 4 ranks with two stages each have one a stage
COMMON = (
    *("model.vocab_size=256", "model.tie_embeddings=false", "router.balance_loss=0", "train.ledger=false", "optim=sgd"),
    *("optim.lr=0.01", "optim.clip_norm=0", f"model.num_layers={LAYERS}"),
)
EMULATED = ("experiment=ladder", "router=topk", "model.num_experts=4", "model.positions=rope", *COMMON)  # its wide stream
REAL = ("model=laptop", "train.seq_len=128", "train.micro_batch_size=2", *COMMON)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from megalina.cli.compare import exit_code
    from megalina.explain import explain

    def run() -> None:
        try:
            found = measured(args)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, args.overrides)) from None
        from benchmarks.pipelining.torch_report import draw, report

        print(report(found))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        if args.picture:
            draw(args.picture, found)

    return exit_code(run)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """By number of ranks.  Everything is checked before a rank starts."""
    from benchmarks.pipelining.tables import KINDS, kind_of, said_of_all
    from megalina.launch import num_cores
    from megalina.namespaces import check_host

    parts, ranks = args.parts.split(","), [int(word) for word in args.ranks.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts {','.join(unknown)}: choose of {', '.join(PARTS)}")
    kinds = [kind_of(name) for name in args.only.split(",")] if args.only else list(KINDS)
    if args.real_math and max(ranks) > num_cores():
        raise ValueError(
            f"--real-math with {max(ranks)} ranks on {num_cores()} cores: ranks would wait for cores, not for each other; give "
            f"--ranks {num_cores()}, or leave --real-math out"
        )
    bases = {world: base_of(args, world) for world in ranks}
    if "times" in parts and args.link_mbit:
        check_host()
    out: dict[str, Any] = {"micro_batches": args.micro_batches, "note": note(args), "ranks": {}}
    with tempfile.TemporaryDirectory(prefix="megalina_torch_pipelines_") as name:
        folder = Path(name)
        for world, config in bases.items():
            row: dict[str, Any] = out["ranks"].setdefault(str(world), {})
            if "tables" in parts:
                row["tables"] = {kind.name: said_of_all(kind, world, args.micro_batches) for kind in kinds}
            if "exact" in parts:
                row["exact"] = exact(config, kinds, world, folder)
            if "times" in parts:
                row["times"] = times(args, config, kinds, world, row.get("exact"), folder)
    return out


def base_of(args: argparse.Namespace, ranks: int) -> "PretrainConfig":
    """The model and what a step has of it, without a pipeline."""
    from benchmarks.pipelining.torch_model import check_model
    from megalina.cli.compare import slowed
    from megalina.compose import compose

    words = [*(REAL if args.real_math else EMULATED), *args.overrides]
    config = compose([*words, f"launch.ranks={ranks}"])
    train = replace(config.train, global_batch_size=config.train.micro_batch_size * args.micro_batches)
    config = replace(config, train=train, cluster=slowed(config.cluster, args.slow_motion))
    check_model(config)
    return config


def note(args: argparse.Namespace) -> str:
    links = f"a link of {args.link_mbit:g} Mbit/s a rank" if args.link_mbit else "no emulated links"
    devices = "real math" if args.real_math else "emulated devices"
    return f"{devices}, {links}" + (f", {args.slow_motion:g} times in slow motion" if args.slow_motion != 1 else "")


def exact(config: "PretrainConfig", kinds: Sequence[Any], ranks: int, folder: Path) -> dict[str, Any]:
    """By schedule and by who ran it.  Tables that the check refuses are not run."""
    from benchmarks.pipelining.exact import MICRO_BATCHES, tables_on_our_ranks, torchs_own_run
    from benchmarks.pipelining.tables import said_of, table_of
    from benchmarks.pipelining.torch_report import OURS_WITH_MESSAGES
    from benchmarks.pipelining.turns import LATE, OURS, TORCH

    legal = [kind for kind in kinds if not said_of(table_of(kind, ranks, MICRO_BATCHES))]
    out: dict[str, Any] = {kind.name: {} for kind in kinds}
    for messages, title in ((False, OURS), (True, OURS_WITH_MESSAGES)):
        for name, outcome in tables_on_our_ranks(config, legal, ranks, folder, messages=messages).items():
            out[name][title] = _as_json(outcome)
    for kind in kinds:
        for late in (False, True)[: 1 + kind.takes_late_receives]:
            outcome = torchs_own_run(config, kind, ranks, late_receives=late)
            out[kind.name][LATE if late else TORCH] = _as_json(outcome)
    return out


def _as_json(outcome: Any) -> dict[str, Any]:
    return asdict(outcome) | {"error": outcome.error if math.isfinite(outcome.error) else None, "exact": outcome.exact}


def times(
    args: argparse.Namespace, config: "PretrainConfig", kinds: Sequence[Any], ranks: int, known: Any, folder: Path
) -> dict[str, Any]:
    """All schedules and sides in one job; figures of a cluster in slow motion are in its own time.  `known`: what is exact;
    without it torch's late receives are left out, which may hang."""
    from omegaconf import OmegaConf

    from benchmarks.pipelining.exact import in_a_pipeline
    from benchmarks.pipelining.tables import said_of, table_of
    from benchmarks.pipelining.torch_report import summary_of
    from benchmarks.pipelining.turns import LATE, OURS, TORCH
    from megalina import launch
    from megalina.cli.compare import RanksFailed
    from megalina.namespaces import emulated_cluster
    from megalina.validate import check_config

    configs, sides = {}, {}
    for kind in kinds:
        text = table_of(kind, ranks, args.micro_batches)
        (table := folder / f"{kind.name}_{ranks}_{args.micro_batches}.csv").write_text(text)
        piped = in_a_pipeline(config, kind, ranks, kind.ours if said_of(text) else str(table))
        piped = replace(piped, train=replace(piped.train, micro_batch_size=config.train.micro_batch_size))
        check_config(piped, ranks)
        configs[kind.name] = piped
        sides[kind.name] = [side for side in (TORCH, LATE) if known and known[kind.name].get(side, {}).get("exact")]
        if known is None:
            sides[kind.name] = [TORCH]
        sides[kind.name].append(OURS)
    out, path = folder / f"found_{ranks}.json", folder / f"spec_{ranks}.json"
    texts = {name: OmegaConf.to_yaml(OmegaConf.structured(of)) for name, of in configs.items()}
    spec = {"configs": texts, "sides": sides, "rounds": args.rounds, "turn": args.steps, "timeout_s": 120, "out": str(out)}
    path.write_text(json.dumps(spec))
    command, logs = [sys.executable, "-m", "benchmarks.pipelining.turns", str(path)], folder / f"logs_{ranks}"
    if args.link_mbit:
        with emulated_cluster(nodes=ranks, link_mbit=args.link_mbit / args.slow_motion) as cluster:
            outcome = cluster.run(command, ranks_per_node=1, logs=logs, env={"PYTHONPATH": str(ROOT)})
        if outcome.code:
            raise RanksFailed(f"{ranks} ranks: {outcome.reason}")
    else:
        launch.run_ranks(command, ranks=ranks, logs=logs)
    slowed_mbit = args.link_mbit / args.slow_motion
    return summary_of(json.loads(out.read_text()), configs, turn=args.steps, link_mbit=slowed_mbit, slow_motion=args.slow_motion)


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, number, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py, of the model and the devices"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--ranks", default="2,4", metavar="A,B", help="pipeline ranks (default: 2,4)")
    parser.add_argument("--only", default="", metavar="A,B", help="of torch's schedules, by its names (default: all five)")
    parser.add_argument("--micro-batches", type=whole(1, 10_000), default=8, metavar="N", help="of a step (default: 8)")
    parser.add_argument("--rounds", type=whole(1, 1_000_000), default=5, metavar="N", help="turns of each side (default: 5)")
    parser.add_argument("--steps", type=whole(1, 1_000_000), default=2, metavar="N", help="timed steps a turn (default: 2)")
    parser.add_argument("--link-mbit", type=number(), default=LINK_MBIT, metavar="X",
                        help=f"of each rank, each way (default: {LINK_MBIT:g}; root); 0: ranks share this machine")  # fmt: skip
    parser.add_argument("--slow-motion", type=number(0, 1e6, above=True), default=1.0, metavar="F",
                        help="links and devices slower by this factor, figures divided by it (default: 1)")  # fmt: skip
    parser.add_argument("--real-math", action="store_true", help="no emulated devices")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all numbers")
    parser.add_argument("--picture", type=new_file, metavar="PNG", help="step times as bars; .svg too")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from megalina.console import command

    command(main)
