"""Dense training, sparse inference (DS-MoE): held-out loss against the share of experts that a token uses.

    python benchmarks/dense_training.py --json dense.json --picture dense.png
    python benchmarks/dense_training.py --seeds 1 --steps 20 model.d_model=64        (a look at it)

At equal parameters and tokens, from the same seeds, on the text of experiment=laptop:

- dense: a dense MLP as wide as all experts together;
- sparse: router=topk, two of the experts in training and in inference;
- DS-MoE: router=dense with each ALPHA (router.mutual_information_loss), then asked to use few experts: so many of the most
  probable (top_k), those above a threshold, or as many as are above it on average.

Losses are of the validation text, nats per token, in one process.

Speeds are of this process and of the first seed's models, which take turns, so that all meet the same hours of the machine:
training a few steps a turn, inference one pass over the validation text.  Beside the median of tokens/s stands its ratio to the
dense MLP of the same round, median and range over rounds.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalina.arguments import Parser, new_file, whole
from megalina.batch import Batch
from megalina.blocks.selection import Selection
from megalina.compare.interleaved import run_interleaved
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
ROUNDS = 9  # of speeds
STEPS_PER_TURN = 3  # of training
DENSE, SPARSE = "dense", "sparse"


@dataclass(slots=True)
class Quiet:
    """A tracker that shows nothing and counts the steps that ended."""

    steps: int = 0

    def log(self, record: dict[str, Any]) -> None:
        self.steps += 1

    def rewind(self, step: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Point:
    """One way to use one trained model; JSON has these names."""

    model: str  # dense, sparse, or DS-MoE with its ALPHA
    rule: str  # how experts are selected; "all": as trained
    seed: int
    active_fraction: float  # experts that computed a token over all experts
    loss: float  # nats per token


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one way to use one model; JSON has these names."""

    model: str
    rule: str  # "training", or as of a Point
    tokens_per_s: float  # median over rounds
    ratio_to_dense: float  # of the same rounds, training to training, inference to inference: median,
    ratio_range: tuple[float, float]  # and range


@dataclass(frozen=True, slots=True)
class Trained:
    gpt: GPT
    batches: list[Batch]  # validation text
    config: PretrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    torch.set_num_threads(args.threads)
    try:
        points, speeds = run(args)
    except (ValueError, OSError) as error:
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used, torch {torch.__version__}"
    result = {
        "machine": machine, "steps": args.steps, "overrides": args.overrides,
        "points": [asdict(p) for p in points], "speeds": [asdict(s) for s in speeds],
    }  # fmt: skip
    print(table(points), speed_table(speeds), sep="\n\n")
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        draw(args.picture, points)
    return 0


def run(args: argparse.Namespace) -> tuple[list[Point], list[Speed]]:
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
        points, first = [], {}
        for number, (name, seed, config) in enumerate(jobs):
            print(f"{number + 1}/{len(jobs)}: {name}, seed {seed}", file=sys.stderr)
            trained = trained_to_the_end(config)
            points += points_of(name, seed, trained)
            first.setdefault(name, trained)
        print("speeds, in turns", file=sys.stderr)
        return points, [*training_speeds(first), *inference_speeds(first)]


def models_of(alphas: Sequence[float]) -> dict[str, tuple[str, ...]]:
    """Name -> overrides."""
    return {
        DENSE: (),
        SPARSE: ("router=topk",),
        **{f"DS-MoE, ALPHA {a:g}": ("router=dense", f"router.mutual_information_loss={a}") for a in alphas},
    }


def points_of(name: str, seed: int, trained: Trained) -> Iterator[Point]:
    """A trained model used in every way that it can be used in."""
    for rule, selection in rules_of(name, trained.config.model.num_experts).items():
        trained.gpt.select(selection)
        yield Point(name, rule, seed, *judged(trained.gpt, trained.batches))


def trained_to_the_end(config: PretrainConfig) -> Trained:
    """The model after its last step.  KeyboardInterrupt for a signal, after which a run would be saved as it is: there are no
    results of half a training."""
    Path(config.run.dir).mkdir(parents=True)
    tracker = Quiet()
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    trainer = Trainer(config, data, device=torch.device("cpu"), tracker=tracker)  # type: ignore[arg-type]
    trainer.begin(None)
    trainer.loop()
    trainer.runner.close()
    if tracker.steps < config.train.steps:
        raise KeyboardInterrupt
    return Trained(trainer.built.trainable.gpt.eval(), held_out(config, data), config)


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
def judged(gpt: GPT, batches: Sequence[Batch]) -> tuple[float, float]:
    """Active fraction, and loss in nats per token."""
    nats = tokens = 0.0
    chosen = valid = 0
    for batch in batches:
        losses = gpt(batch)
        nats, tokens = nats + float(losses.loss), tokens + int(batch.loss_mask_BS.sum())
        chosen += sum(int(load[:-1].sum()) for load in losses.loads)
        valid += int(batch.valid_BS.sum())
    layers = len(gpt.moe_layers)
    return chosen / (valid * layers * gpt.config.num_experts) if layers else 1.0, nats / tokens


def training_speeds(models: Mapping[str, Trained]) -> list[Speed]:
    """New models with the configurations of these, in one process, a few steps in turn."""
    config = models[DENSE].config
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    # A warm-up, and a step that isn't timed in each turn: the schedule has to last for all of them.
    steps = (ROUNDS + 1) * (STEPS_PER_TURN + 1) + 1
    configs = {name: replace(m.config, train=replace(m.config.train, steps=steps)) for name, m in models.items()}
    competitors = run_interleaved(configs, data, rounds=ROUNDS, turn=STEPS_PER_TURN)
    tokens = config.train.global_batch_size * config.train.seq_len
    return in_turns({(c.name, "training"): _by_round(c.step_s) for c in competitors}, tokens)


@torch.inference_mode()
def inference_speeds(models: Mapping[str, Trained]) -> list[Speed]:
    """A pass over the validation text with each way, again and again, each round beginning with another one."""
    ways = [(name, rule) for name, m in models.items() for rule in rules_of(name, m.config.model.num_experts)]
    took_s: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        at = number % len(ways)
        for name, rule in ways[at:] + ways[:at]:
            gpt = models[name].gpt
            gpt.select(rules_of(name, models[name].config.model.num_experts)[rule])
            began_s = time.perf_counter()
            for batch in models[name].batches:
                gpt.hidden(batch)
            if number:  # the first round warms up
                took_s[name, rule].append(time.perf_counter() - began_s)
    return in_turns(took_s, sum(int(batch.valid_BS.sum()) for batch in models[DENSE].batches))


def in_turns(took_s: Mapping[tuple[str, str], Sequence[float]], tokens: int) -> list[Speed]:
    """From the seconds that each model and way took for `tokens`, a figure per round; the dense MLP's own way is the measure."""
    dense_s = next(own for (name, _), own in took_s.items() if name == DENSE)
    out = []
    for (name, rule), own in took_s.items():
        ratios = [theirs / mine for theirs, mine in zip(dense_s, own, strict=True)]
        out.append(Speed(name, rule, tokens / statistics.median(own), statistics.median(ratios), (min(ratios), max(ratios))))
    return out


def _by_round(step_s: Sequence[float]) -> list[float]:
    """The median of each turn's steps."""
    turns = [step_s[first : first + STEPS_PER_TURN] for first in range(0, len(step_s), STEPS_PER_TURN)]
    return [statistics.median(turn) for turn in turns]


def table(points: Sequence[Point]) -> str:
    """Means over seeds, in Markdown."""
    lines = ["| model | experts used by | active fraction | loss | its spread |", "|---|---|---|---|---|"]
    for (model, rule), own in _by_way(points).items():
        losses = [p.loss for p in own]
        active, spread = statistics.fmean(p.active_fraction for p in own), max(losses) - min(losses)
        lines.append(f"| {model} | {rule} | {active:.3f} | {statistics.fmean(losses):.4f} | {spread:.4f} |")
    return "\n".join(lines)


def speed_table(speeds: Sequence[Speed]) -> str:
    lines = [f"| model | experts used by | tokens/s | of the dense MLP | range in {ROUNDS} rounds |", "|---|---|---|---|---|"]
    for s in speeds:
        low, high = s.ratio_range
        lines.append(f"| {s.model} | {s.rule} | {s.tokens_per_s:,.0f} | {s.ratio_to_dense:.2f}x | {low:.2f} to {high:.2f}x |")
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
    axis.set_ylabel("held-out loss, nats per token")
    axis.legend(fontsize=7)
    figure.savefig(path)


def _by_way(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    out: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        out.setdefault((p.model, p.rule), []).append(p)
    return out


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
