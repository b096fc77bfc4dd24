"""Muon against AdamW: held-out loss at equal tokens, bytes of state, and what Newton-Schulz adds to the tail of a step.

    python benchmarks/muon.py --parts train --json muon.json                (hours on two cores)
    python benchmarks/muon.py --parts train --lrs 0.003 --seeds 1 --steps 4 model.d_model=64          (a look at it)
    python benchmarks/muon.py --parts tail                                  (virtual time alone; trains nothing)
    sudo python benchmarks/muon.py --parts wire --json wire.json            (a quarter of an hour, idle; root, iproute2)

- train: on model and text of experiment=laptop, in one process.  First each optimizer with each learning rate from one seed,
  then each with its own best one from other seeds, the same for both.  Losses are of the validation text, nats a token; state is
  what the optimizer keeps, main weights aside.
- tail: OLMoE-1B-7B on 4 nodes of 8 H100 in virtual time, without and with ZeRO-1; Newton-Schulz in bfloat16.  A tail is what
  comes after the last backward instruction.  AdamW; Muon at the end; Muon under tokens, behind so many all-to-alls
  (`strategy.newton_schulz_after`), in steps that are not clipped: those that are make all directions again at the end.
- wire: the same lists on emulated devices and links, measured in turns (benchmarks/newton_schulz_wire.py).
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import newton_schulz_wire
from benchmarks.dense_training import held_out, trained_to_the_end
from benchmarks.newton_schulz_wire import OnTheWire
from megalina.arguments import Parser, new_file, number, whole
from megalina.cli.compare import exit_code
from megalina.compose import compose
from megalina.config import CheckpointConfig, PretrainConfig, RunConfig
from megalina.console import command
from megalina.explain import explain
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.plan_settings import plan_of
from megalina.timeline.recorder import COMPUTE
from megalina.validate import check_config

PARTS = ("train", "tail", "wire")
SWEEP_SEED = 0  # those that follow are of the runs that count
OPTIMIZERS = ("adamw", "muon")
MOST_FURTHER = 4  # learning rates beyond those of --lrs, by factors of two
JOB = (  # of experiment=laptop
    *("experiment=laptop", "launch.ranks=1", "parallel.ep=1", "train.eval_interval=0"),
    *("train.micro_batch_size=8", "tracker.samples=0"),
)
NODES, RANKS_PER_NODE = 4, 8
CLUSTER = (
    *("model=olmoe_1b_7b", "cluster=h100_400g", f"cluster.nodes={NODES}", f"launch.ranks={NODES * RANKS_PER_NODE}"),
    *("parallel.ep=8", "train.dtype=bfloat16", "train.seq_len=4096", "train.micro_batch_size=1", "train.global_batch_size=32"),
    "optim.muon_dtype=bfloat16",
)
AFTERS = (1, 2, 4, 8)  # all-to-alls
LRS = [1.5e-3, 3e-3, 6e-3, 1.2e-2]


@dataclass(frozen=True, slots=True)
class Trained:
    """One run."""

    optimizer: str
    lr: float
    seed: int
    loss: float  # nats a token, held out
    state_bytes: int
    tokens_per_s: float  # of this process, from the second step on


@dataclass(frozen=True, slots=True)
class Tail:
    """One list in virtual time; all ranks are alike."""

    name: str
    zero: int
    step_ms: float
    tail_ms: float
    newton_schulz_ms: float  # of one rank, wherever it is
    peak_gb: float


@dataclass(slots=True)
class Found:
    """So far."""

    sweep: list[Trained] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    tails: list[Tail] = field(default_factory=list)
    wire: list[OnTheWire] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    torch.set_num_threads(args.threads)
    return exit_code(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    parts, found = args.parts.split(","), Found()
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts {args.parts}: {unknown[0]} is none of {', '.join(PARTS)}")
    try:
        if "train" in parts:
            train(args, found)
        if "tail" in parts:
            found.tails = [tail for zero in (0, 1) for tail in tails_of(zero)]
        if "wire" in parts:
            setting = newton_schulz_wire.setting_of(args.only, args.slow_motion)
            found.wire = newton_schulz_wire.measure(setting, rounds=args.rounds, steps=args.timed_steps)
    except (ValueError, OSError) as error:
        raise ValueError(explain(error, args.overrides)) from error
    training = [table_of_training(found.sweep), table_of_training(found.trained), difference_of(found)]
    print("\n\n".join(filter(None, (*training, table_of_tails(found.tails), newton_schulz_wire.table(found.wire)))))
    print(json.dumps(as_json(args, found)))
    keep(args, found)


def as_json(args: argparse.Namespace, found: Found) -> dict[str, Any]:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used, torch {torch.__version__}"
    return {"machine": machine, "steps": args.steps, "overrides": args.overrides, **asdict(found)}


def keep(args: argparse.Namespace, found: Found) -> None:
    """In the file, if one was asked for: after each run, as they take long."""
    if args.json:
        args.json.write_text(json.dumps(as_json(args, found), indent=1) + "\n")


# training
def train(args: argparse.Namespace, found: Found) -> None:
    """A sweep with one seed, if there is more than one learning rate, and further where the best one is at its end; then each
    optimizer with its best one and `args.seeds` seeds.  All configurations are checked before the first is trained."""
    lrs = args.lrs if len(args.lrs) > 1 else []
    sweep = [(name, lr, SWEEP_SEED) for lr in lrs for name in OPTIMIZERS]
    seeds = range(SWEEP_SEED + 1, SWEEP_SEED + 1 + args.seeds)
    with tempfile.TemporaryDirectory(prefix="megalina_muon_") as folder:
        for name, lr, seed in [*sweep, *((name, args.lrs[0], seed) for name in OPTIMIZERS for seed in seeds)]:
            check_config(config_of(args, name, lr, seed, folder), 1)
        known = known_runs(args)
        total = len(sweep) + len(OPTIMIZERS) * len(seeds)

        def run(into: list[Trained], name: str, lr: float, seed: int) -> None:
            done = len(found.sweep) + len(found.trained)
            if (trained := known.get((name, lr, seed))) is None:
                print(f"{done + 1}/{total}: {name}, learning rate {lr:g}, seed {seed}", file=sys.stderr)
                trained = trained_of(name, lr, seed, config_of(args, name, lr, seed, folder))
            into.append(trained)
            keep(args, found)

        for job in sweep:
            run(found.sweep, *job)
        for name in OPTIMIZERS if lrs else ():
            for _ in range(MOST_FURTHER):
                if lr := beyond(found.sweep, name):
                    total += 1
                    run(found.sweep, name, lr, SWEEP_SEED)
        for seed in seeds:  # both in turn: what else the machine does hits both
            for name in OPTIMIZERS:
                run(found.trained, name, best_lr(found.sweep, name) if lrs else args.lrs[0], seed)


def config_of(args: argparse.Namespace, name: str, lr: float, seed: int, folder: str) -> PretrainConfig:
    own = (f"optim={name}", f"optim.lr={lr}", f"train.steps={args.steps}", f"train.seed={seed}")
    config = compose([*JOB, *own, *args.overrides])
    run = RunConfig(dir=f"{folder}/{name} {lr} {seed}")
    return replace(config, checkpoint=CheckpointConfig(interval=0), run=run)


def known_runs(args: argparse.Namespace) -> dict[tuple[str, float, int], Trained]:
    """Of `--known`, by optimizer, learning rate and seed.  ValueError unless they were as long and as large."""
    if not args.known:
        return {}
    kept = json.loads(args.known.read_text())
    if (kept["steps"], kept["overrides"]) != (args.steps, args.overrides):
        raise ValueError(
            f"--known {args.known} is of {kept['steps']} steps and {kept['overrides']}, this is of {args.steps} and "
            f"{args.overrides}: give the same"
        )
    runs = [Trained(**run) for run in kept["sweep"] + kept["trained"]]
    return {(run.optimizer, run.lr, run.seed): run for run in runs}


def beyond(sweep: Sequence[Trained], optimizer: str) -> float | None:
    """The next learning rate by factors of two, where the best one is at the end of those that were tried."""
    lrs = sorted(run.lr for run in sweep if run.optimizer == optimizer)
    best = best_lr(sweep, optimizer)
    return lrs[0] / 2 if best == lrs[0] else lrs[-1] * 2 if best == lrs[-1] else None


def best_lr(sweep: Sequence[Trained], optimizer: str) -> float:
    """With the least loss.  What has diverged is no candidate."""
    own = [run for run in sweep if run.optimizer == optimizer and math.isfinite(run.loss)]
    if not own:
        raise ValueError(f"{optimizer} diverged with every learning rate of --lrs: give smaller ones")
    return min(own, key=lambda run: run.loss).lr


def difference_of(found: Found) -> str:
    """Of both optimizers, seed by seed; and whether the sweep was wide enough."""
    if not found.trained:
        return ""
    by_seed: dict[int, dict[str, float]] = {}
    for run in found.trained:
        by_seed.setdefault(run.seed, {})[run.optimizer] = run.loss
    less = [of["muon"] - of["adamw"] for of in by_seed.values()]
    lines = [f"Muon's held-out loss less AdamW's, seed by seed: {', '.join(f'{d:+.4f}' for d in less)}"]
    for name in OPTIMIZERS if found.sweep else ():
        if beyond(found.sweep, name):
            lines.append(
                f"{name} is best at {best_lr(found.sweep, name):g}, the end of what was tried: give --lrs further from it"
            )
    return "\n".join(lines)


def trained_of(name: str, lr: float, seed: int, config: PretrainConfig) -> Trained:
    trainer, data, rate = trained_to_the_end(config)
    states = trainer.built.optimizer.slices().values()
    state_bytes = sum(part.local.nbytes for parts in states for part in parts)  # in float32 there are no master weights
    gpt, nats, tokens = trainer.built.trainable.gpt.eval(), 0.0, 0
    with torch.inference_mode():
        for batch in held_out(config, data):
            nats, tokens = nats + float(gpt(batch).loss), tokens + int(batch.loss_mask_BS.sum())
    return Trained(name, lr, seed, nats / tokens, state_bytes, rate)


# virtual time
def tails_of(zero: int) -> list[Tail]:
    out = [tail_of("AdamW", zero), tail_of("Muon, at the end", zero, "optim=muon")]
    for after in AFTERS:
        name, own = f"Muon, after {after} all-to-all{'s' * (after > 1)}", f"strategy.newton_schulz_after={after}"
        out.append(tail_of(name, zero, "optim=muon", own))
    return out


def tail_of(name: str, zero: int, *overrides: str) -> Tail:
    """From the end of the last backward instruction to the end of the step."""
    world = NODES * RANKS_PER_NODE
    config = compose([*CLUSTER, f"parallel.zero={zero}", *overrides])
    check_config(config, world)
    step = PricedStep(config, world, plan_of(config.strategy), vocab_size=config.model.vocab_size)
    timeline = step.walk(program=step.program)
    computed = [e for e in timeline.events(0) if e.kind == COMPUTE]
    last_s = max(e.end_s for e in computed if e.phase in ("B", "W"))
    own_s = sum(e.end_s - e.start_s for e in computed if e.name.startswith("newton_schulz "))
    return Tail(name, zero, timeline.step_s * 1e3, (timeline.step_s - last_s) * 1e3, own_s * 1e3, step.memory.peak / 1e9)


# tables, in Markdown
def table_of_training(runs: Sequence[Trained]) -> str:
    """Means over seeds."""
    if not runs:
        return ""
    lines = ["| optimizer | learning rate | held-out loss | its spread | state, MB | tokens/s |", "|---|---|---|---|---|---|"]
    for name, lr in dict.fromkeys((run.optimizer, run.lr) for run in runs):
        own = [run for run in runs if (run.optimizer, run.lr) == (name, lr)]
        losses = [run.loss for run in own]
        lines.append(
            f"| {name} | {lr:g} | {statistics.fmean(losses):.4f} | {max(losses) - min(losses):.4f} | "
            f"{own[0].state_bytes / 1e6:.1f} | {statistics.fmean(run.tokens_per_s for run in own):,.0f} |"
        )
    return "\n".join(lines)


def table_of_tails(tails: Sequence[Tail]) -> str:
    if not tails:
        return ""
    lines = ["| list | ZeRO | step, ms | tail, ms | Newton-Schulz, ms | peak, GB |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {t.name} | {t.zero} | {t.step_ms:.1f} | {t.tail_ms:.1f} | {t.newton_schulz_ms:.1f} | {t.peak_gb:.1f} |" for t in tails
    ]
    return "\n".join(lines)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py, for all runs of train")
    parser.add_argument("--parts", default="train,tail", metavar="A,B", help=f"of {', '.join(PARTS)} (default: train,tail)")
    parser.add_argument("--seeds", type=whole(1, 1000), default=3, help="so many runs of each (default 3)")
    parser.add_argument("--steps", type=whole(2, 1_000_000), default=240, help="of training (default 240)")
    parser.add_argument(
        "--lrs",
        type=_numbers,
        default=LRS,
        metavar="A,B",
        help="peak learning rates of the sweep, which goes further where the best one is at its end; one: no sweep",
    )
    parser.add_argument("--only", default="4x1 light", metavar="NAME", help="of the ladder, for wire (default: 4x1 light)")
    parser.add_argument("--slow-motion", type=number(0, 1e6, above=True), default=newton_schulz_wire.SLOW_MOTION, metavar="F",
                        help=f"of wire (default: {newton_schulz_wire.SLOW_MOTION:g})")  # fmt: skip
    parser.add_argument("--rounds", type=whole(1, 1_000_000), default=5, help="of wire: turns of each list (default 5)")
    parser.add_argument("--timed-steps", type=whole(1, 1_000_000), default=2, help="of a turn of wire (default 2)")
    parser.add_argument("--threads", type=whole(1, 1024), default=min(2, os.cpu_count() or 1), help="of this process (default 2)")
    parser.add_argument("--known", type=Path, metavar="FILE", help="of an earlier --json: what was trained there isn't again")
    parser.add_argument("--json", type=new_file, help="write the results here too")
    return parser


if __name__ == "__main__":
    command(main)
