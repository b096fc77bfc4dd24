"""Dense training, sparse inference (DS-MoE): held-out loss against the share of experts that a token uses.

    python benchmarks/dense_training.py --json dense.json --picture dense.png
    python benchmarks/dense_training.py --seeds 1 --steps 20 model.d_model=64        (a look at it)

At equal parameters and tokens, from the same seeds, on the text of experiment=laptop:

- dense: a dense MLP as wide as all experts together;
- sparse: router=topk, two of the experts in training and in inference;
- DS-MoE: router=dense with each ALPHA (router.mutual_information_loss), then asked to use few experts: so many of the most
  probable (top_k), those above a threshold, or as many as are above it on average.

Losses are of the validation text, nats a token, in one process.  Tokens/s are of this process: of training from the second
step on, of inference the median over repeated passes over the validation text.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megalina.arguments import Parser, new_file, whole
from megalina.batch import Batch
from megalina.blocks.selection import Selection
from megalina.compose import compose
from megalina.config import CheckpointConfig, PretrainConfig, RunConfig
from megalina.console import command
from megalina.data.source import TokenData, open_data
from megalina.explain import explain
from megalina.model.gpt import GPT
from megalina.train.trainer import Trainer
from megalina.validate import check_config

BAD_INPUT = 2  # exit code
SMALL = (  # of experiment=laptop
    *("launch.ranks=1", "parallel.ep=1", "model.num_layers=2", "model.d_model=128", "model.d_ff=128", "train.seq_len=64"),
    *("data.vocab_size=1024", "train.eval_sequences=64", "train.eval_interval=0", "schedule.warmup_steps=10"),
)
THRESHOLDS = (0.25, 0.5, 0.75, 1.0, 1.5)
REPEATS = 3
DENSE, SPARSE = "dense", "sparse"


@dataclass(slots=True)
class Quiet:
    """A tracker that shows nothing and remembers when each step ended."""

    ended_s: list[float] = field(default_factory=list)

    def log(self, record: dict[str, Any]) -> None:
        self.ended_s.append(time.perf_counter())

    def rewind(self, step: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Point:
    """One way to use one trained model; JSON has these names."""

    model: str  # dense, sparse, or DS-MoE with its ALPHA
    rule: str  # how experts are selected; "all": as trained
    seed: int
    active_fraction: float  # experts that computed a token over all experts
    loss: float  # nats a token
    tokens_per_s: float  # of inference
    training_tokens_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    torch.set_num_threads(args.threads)
    try:
        points = run(args)
    except (ValueError, OSError) as error:
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used, torch {torch.__version__}"
    result = {"machine": machine, "steps": args.steps, "overrides": args.overrides, "points": [_as_json(p) for p in points]}
    print(table(points))
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        draw(args.picture, points)
    return 0


def run(args: argparse.Namespace) -> list[Point]:
    """Every model with every seed; all configurations are checked before the first is trained."""
    with tempfile.TemporaryDirectory(prefix="megalina_dense_training_") as folder:
        jobs = []
        for seed in range(args.seeds):
            for name, own in models_of(args.alphas).items():
                overrides = ["experiment=laptop", *SMALL, *own, f"train.steps={args.steps}", f"train.seed={seed}"]
                config = compose([*overrides, *args.overrides])
                if name == DENSE:  # no layer has experts
                    model = config.model
                    wide = replace(model, dense_layers_first=model.num_layers, dense_d_ff=model.num_experts * model.d_ff)
                    config = replace(config, model=wide)
                config = replace(config, run=RunConfig(dir=f"{folder}/{name} {seed}"), checkpoint=CheckpointConfig(interval=0))
                check_config(config, 1)
                jobs.append((name, seed, config))
        points = []
        for number, (name, seed, config) in enumerate(jobs):
            print(f"{number + 1}/{len(jobs)}: {name}, seed {seed}", file=sys.stderr)
            points += points_of(name, seed, config)
    return points


def models_of(alphas: Sequence[float]) -> dict[str, tuple[str, ...]]:
    """Name -> overrides."""
    return {
        DENSE: (),
        SPARSE: ("router=topk",),
        **{f"DS-MoE, ALPHA {a:g}": ("router=dense", f"router.mutual_information_loss={a}") for a in alphas},
    }


def points_of(name: str, seed: int, config: PretrainConfig) -> Iterator[Point]:
    """Train one model, then use it in every way that it can be used in."""
    trainer, data, trained = trained_to_the_end(config)
    gpt, batches = trainer.built.trainable.gpt.eval(), held_out(config, data)
    for rule, selection in rules_of(name, config.model.num_experts).items():
        gpt.select(selection)
        loss, active, rate = judged(gpt, batches)
        yield Point(name, rule, seed, active, loss, rate, trained)


def trained_to_the_end(config: PretrainConfig) -> tuple[Trainer, TokenData, float]:
    """The trainer after its last step, its text, tokens/s.  KeyboardInterrupt for a signal, after which a run would be saved as
    it is: there are no results of half a training."""
    Path(config.run.dir).mkdir(parents=True)
    train, tracker = config.train, Quiet()
    data = open_data(config.data, seq_len=train.seq_len, seed=train.seed)
    trainer = Trainer(config, data, device=torch.device("cpu"), tracker=tracker)  # type: ignore[arg-type]
    trainer.begin(None)
    trainer.loop()
    trainer.runner.close()
    ended_s = tracker.ended_s
    if len(ended_s) < train.steps:
        raise KeyboardInterrupt
    return trainer, data, train.global_batch_size * train.seq_len * (len(ended_s) - 1) / (ended_s[-1] - ended_s[0])


def rules_of(name: str, num_experts: int) -> dict[str, Selection | None]:
    out: dict[str, Selection | None] = {"all": None}
    if name in (DENSE, SPARSE):
        return out
    fewer = [k for k in (1, 2, 3, 4, 6) if k < num_experts]
    out |= {f"top_k {k}": Selection("top_k", k=k) for k in fewer}
    out |= {f"threshold {t:g}": Selection("threshold", threshold=t) for t in THRESHOLDS}
    return out | {f"threshold_top_k {t:g}": Selection("threshold_top_k", threshold=t) for t in THRESHOLDS}


def held_out(config: PretrainConfig, data: TokenData) -> list[Batch]:
    if data.valid is None:
        raise ValueError(f"data.split={config.data.split} leaves no validation text: give it a share")
    size, count = config.train.micro_batch_size, min(config.train.eval_sequences, data.valid.num_sequences)
    return [data.valid.batch(first, min(size, count - first)) for first in range(0, count, size)]


@torch.inference_mode()
def judged(gpt: GPT, batches: Sequence[Batch]) -> tuple[float, float, float]:
    """Loss, active fraction, and tokens/s of a forward pass."""
    nats = tokens = 0.0
    chosen = valid = 0
    for batch in batches:
        losses = gpt(batch)
        nats, tokens = nats + float(losses.loss), tokens + int(batch.loss_mask_BS.sum())
        chosen += sum(int(load[:-1].sum()) for load in losses.loads)
        valid += int(batch.valid_BS.sum())
    layers = len(gpt.moe_layers)
    took_s = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        for batch in batches:
            gpt.hidden(batch)
        took_s.append(time.perf_counter() - began_s)
    active = chosen / (valid * layers * gpt.config.num_experts) if layers else 1.0
    return nats / tokens, active, valid / statistics.median(took_s)


def table(points: Sequence[Point]) -> str:
    """Means over seeds, in Markdown."""
    lines = ["| model | experts used by | active fraction | loss | its spread | tokens/s | training tokens/s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (model, rule), own in _by_way(points).items():
        active, rate, trained = (
            statistics.fmean(getattr(p, name) for p in own)
            for name in ("active_fraction", "tokens_per_s", "training_tokens_per_s")
        )
        losses = [p.loss for p in own]
        spread = max(losses) - min(losses)
        lines.append(
            f"| {model} | {rule} | {active:.3f} | {statistics.fmean(losses):.4f} | {spread:.4f} | {rate:,.0f} | {trained:,.0f} |"
        )
    return "\n".join(lines)


def draw(path: Path, points: Sequence[Point]) -> None:
    """Loss against active fraction: a curve for each model and rule, means over seeds with their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    curves: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for (model, rule), own in _by_way(points).items():
        losses, kind = [p.loss for p in own], rule.partition(" ")[0]
        at = (statistics.fmean(p.active_fraction for p in own), statistics.fmean(losses), min(losses), max(losses))
        kinds = ("top_k", "threshold", "threshold_top_k") if kind == "all" and model not in (DENSE, SPARSE) else (kind,)
        for one in kinds:  # all experts are the end of every rule's curve
            curves.setdefault((model, one), []).append(at)
    colours = {model: f"C{i}" for i, model in enumerate(dict.fromkeys(p.model for p in points))}
    styles = {"top_k": "-", "threshold": "--", "threshold_top_k": ":", "all": ""}
    for (model, kind), found in curves.items():
        x, y, low, high = zip(*sorted(found), strict=True)
        label = model if kind == "all" else f"{model}, {kind}"
        axis.plot(x, y, styles[kind], color=colours[model], marker="s" if kind == "all" else "o", markersize=4, label=label)
        axis.fill_between(x, low, high, color=colours[model], alpha=0.15)
    axis.set_xlabel("active fraction: experts that compute a token over all experts")
    axis.set_ylabel("held-out loss, nats a token")
    axis.legend(fontsize=7)
    figure.savefig(path)


def _by_way(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    out: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        out.setdefault((p.model, p.rule), []).append(p)
    return out


def _as_json(point: Point) -> dict[str, Any]:
    return {name: getattr(point, name) for name in Point.__dataclass_fields__}


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py, for all models")
    parser.add_argument("--seeds", type=whole(1, 1000), default=3, help="so many of each model (default 3)")
    parser.add_argument("--steps", type=whole(2, 1_000_000), default=200, help="of training (default 200)")
    parser.add_argument("--alphas", type=_numbers, default=[0.0, 2e-4, 1e-3], metavar="A,B",
                        help="weights of the mutual information loss (default 0,0.0002,0.001)")  # fmt: skip
    parser.add_argument("--threads", type=whole(1, 1024), default=min(2, os.cpu_count() or 1), help="of this process (default 2)")
    parser.add_argument("--json", type=new_file, help="write the results here too")
    parser.add_argument("--picture", type=new_file, help="write a picture here, .png or .svg")
    return parser


if __name__ == "__main__":
    command(main)
