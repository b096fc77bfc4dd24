"""Muon against AdamW: held-out loss at equal tokens, bytes of state, and what Newton-Schulz adds to the tail of a step.

    python benchmarks/muon.py --json muon.json                              (some minutes on two cores)
    python benchmarks/muon.py --lrs 0.001,0.003,0.01 --steps 480
    python benchmarks/muon.py --seeds 1 --steps 4 model.d_model=64          (a look at it)
    python benchmarks/muon.py --parts tail                                  (virtual time alone; trains nothing)

- train: each optimizer with each learning rate from the same seeds, on model and text of experiment=laptop, in one process.
  Losses are of the validation text, nats a token; state is what the optimizer keeps, main weights aside.
- tail: OLMoE-1B-7B on 4 nodes of 8 H100 in virtual time, without and with ZeRO-1; Newton-Schulz in bfloat16.  A tail is what
  comes after the last backward instruction.  AdamW; Muon at the end; Muon under tokens, behind so many all-to-alls
  (`strategy.newton_schulz_after`), in steps that are not clipped: those that are make all directions again at the end.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.dense_training import Quiet, held_out
from megalina.arguments import Parser, new_file, whole
from megalina.compose import compose
from megalina.config import CheckpointConfig, PretrainConfig, RunConfig
from megalina.console import command
from megalina.data.source import open_data
from megalina.explain import explain
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.plan_settings import plan_of
from megalina.timeline.recorder import COMPUTE
from megalina.train.trainer import Trainer
from megalina.validate import check_config

BAD_INPUT = 2  # exit code
PARTS = ("train", "tail")
OPTIMIZERS = ("adamw", "muon")
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


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    torch.set_num_threads(args.threads)
    try:
        parts = args.parts.split(",")
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"--parts {args.parts}: {unknown[0]} is none of {', '.join(PARTS)}")
        trained = train(args) if "train" in parts else []
        tails = [tail for zero in (0, 1) for tail in tails_of(zero)] if "tail" in parts else []
    except (ValueError, OSError) as error:
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    print("\n\n".join(filter(None, (table_of_training(trained), table_of_tails(tails)))))
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used, torch {torch.__version__}",
        "steps": args.steps,
        "overrides": args.overrides,
        "trained": [asdict(run) for run in trained],
        "tails": [asdict(tail) for tail in tails],
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


# training
def train(args: argparse.Namespace) -> list[Trained]:
    """All configurations are checked before the first is trained."""
    with tempfile.TemporaryDirectory(prefix="megalina_muon_") as folder:
        jobs = []
        for seed in range(args.seeds):
            for lr in args.lrs:
                for name in OPTIMIZERS:
                    own = (f"optim={name}", f"optim.lr={lr}", f"train.steps={args.steps}", f"train.seed={seed}")
                    config = compose([*JOB, *own, *args.overrides])
                    config = replace(config, checkpoint=CheckpointConfig(interval=0))
                    config = replace(config, run=RunConfig(dir=f"{folder}/{name} {lr} {seed}"))
                    check_config(config, 1)
                    jobs.append((name, lr, seed, config))
        out = []
        for number, (name, lr, seed, config) in enumerate(jobs):
            print(f"{number + 1}/{len(jobs)}: {name}, learning rate {lr:g}, seed {seed}", file=sys.stderr)
            out.append(trained_of(name, lr, seed, config))
        return out


def trained_of(name: str, lr: float, seed: int, config: PretrainConfig) -> Trained:
    Path(config.run.dir).mkdir(parents=True)
    data, tracker = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed), Quiet()
    trainer = Trainer(config, data, device=torch.device("cpu"), tracker=tracker)  # type: ignore[arg-type]
    trainer.begin(None)
    trainer.loop()
    trainer.runner.close()
    ended_s, sizes = tracker.ended_s, config.train
    rate = sizes.global_batch_size * sizes.seq_len * (len(ended_s) - 1) / (ended_s[-1] - ended_s[0])
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
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)} (default: both)")
    parser.add_argument("--seeds", type=whole(1, 1000), default=3, help="so many runs of each (default 3)")
    parser.add_argument("--steps", type=whole(2, 1_000_000), default=240, help="of training (default 240)")
    parser.add_argument("--lrs", type=_numbers, default=[3e-3], metavar="A,B", help="peak learning rates (default 0.003)")
    parser.add_argument("--threads", type=whole(1, 1024), default=min(2, os.cpu_count() or 1), help="of this process (default 2)")
    parser.add_argument("--json", type=new_file, help="write the results here too")
    return parser


if __name__ == "__main__":
    command(main)
