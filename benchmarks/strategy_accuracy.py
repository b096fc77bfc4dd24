"""Accuracy and stability: does a strategy change what a model learns?  Prints a table in Markdown.

    python benchmarks/strategy_accuracy.py                  (three seeds on a small laptop model, some eight minutes on two cores)
    python benchmarks/strategy_accuracy.py --float64        (ten steps in float64; exit code 1 above 1e-10)

Every strategy trains the same model from the same weights on the same batches, and each loss is held against eager's of the
same step.  `lina, packing 1-2-1` packs and unpacks experts in mid-run, at fixed steps.  In exact arithmetic all curves would
be one; in float32, another order of sums rounds otherwise, and training makes rounding grow: as soon as one token goes to
another expert, curves part as two noisy ones do.  The yardstick for that is `eager, smaller micro-batches`: the same schedule,
with sums in another order.  A strategy that is right parts about as late, and drifts nowhere.

Real math, no emulated times: nothing is measured here but numbers.  --float64 takes the model of the strategies' ladder, with
learned positions, since its experts choose tokens and two tokens that are equal in all would be chosen by their rounding.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.compare.ladder import LADDER
from megalina.config import PretrainConfig
from megalina.console import StatusLine
from megalina.data.source import TokenData, open_data
from megalina.failure_report import RankFailed
from megalina.launch import Stopped, run_ranks
from megalina.mesh import all_gather_object
from megalina.step.strategy import STRATEGIES
from megalina.train.step_runner import StepRunner
from megalina.validate import check_config
from megalina.validate_strategy import PACKED
from megalina.worker import load_config

ROOT = Path(__file__).resolve().parent.parent
FAILED, BAD_INPUT = 1, 2  # exit codes
EAGER, YARDSTICK = "eager", "eager, smaller micro-batches"
APART_NATS = 1e-3  # two curves have parted
FLOAT64_LIMIT = 1e-10  # largest relative difference of a loss
DEFAULTS = {"steps": 100, "seeds": 3, "ranks": 2}
FLOAT64_DEFAULTS = {"steps": 10, "seeds": 1, "ranks": 4}
SMALL = ("model.d_model=128", "model.d_ff=256", "data.vocab_size=1024", "train.seq_len=64")  # of experiment=laptop
REAL_MATH = ("cluster.attention_ms=0", "cluster.experts_ms=0")  # no emulated device
# With RoPE alone, a document that begins with twice the same token has two tokens whose scores are equal in exact
# arithmetic.  Which of them an expert chooses is then up to the last bit, and a loss jumps by 1e-4 of it, eager's too.
NO_TIES = ("model.positions=learned",)


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a strategy, and after which steps the packing changes to what."""

    name: str
    overrides: tuple[str, ...]
    switches: Mapping[int, int]
    adapts: bool = False  # measured steps choose its plan


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    if args.folder:
        return work(args.folder)
    for name, value in (FLOAT64_DEFAULTS if args.float64 else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from megalina.explain import explain

    try:
        with tempfile.TemporaryDirectory(prefix="megalina_accuracy_") as folder:
            found = [run(spec, Path(folder)) for spec in jobs_of(args, Path(folder))]
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except RankFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    rows = rows_of(found)
    print(float64_table(rows) if args.float64 else table(rows))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"\n{args.ranks} gloo ranks, {args.steps} steps; {machine}.")
    if args.json:
        content = {"machine": machine, "ranks": args.ranks, "steps": args.steps, "rows": rows, "seeds": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    wrong = problems(found, limit=FLOAT64_LIMIT if args.float64 else math.inf)
    for line in wrong:
        print(line, file=sys.stderr)
    return FAILED if wrong else 0


def cases_of(names: Sequence[str], *, ep: int, steps: int, micro_batch_size: int) -> list[Case]:
    """Eager first, to which all else is held; then each other name, and those that pack once more with switches."""
    path = packing_path(ep)
    after = {round(steps * (i + 1) / (len(path) + 1)): packing for i, packing in enumerate(path)}
    if len(after) < len(path) or 0 in after:
        raise ValueError(f"--steps {steps}: {len(path)} changes of the packing need at least {2 * len(path)} steps")
    cases = [Case(EAGER, ("strategy=eager",), {})]
    if micro_batch_size > 1:
        cases.append(Case(YARDSTICK, ("strategy=eager", f"train.micro_batch_size={micro_batch_size // 2}"), {}))
    for name in dict.fromkeys(names):
        if name == EAGER:
            continue
        chosen = (f"strategy={name}", *(["parallel.zero=1"] if name == "lina_zero" else []))
        if name == "pair":  # of a micro-batch in two halves
            chosen = (*chosen, f"train.micro_batch_size={max(1, micro_batch_size // 2)}")
        if name == "auto":
            cases.append(Case(name, chosen, {}, adapts=True))
            continue
        cases.append(Case(name, (*chosen, "strategy.packing=1"), {}))
        if name in PACKED and path:
            shown = "-".join(map(str, (1, *path)))
            cases.append(Case(f"{name}, packing {shown}", (*chosen, "strategy.packing=auto"), after))
    return cases


def packing_path(ep: int) -> tuple[int, ...]:
    """Up through all packings that there are groups for, and back: (2, 4, 2, 1) on four ranks."""
    up = [1]
    while ep % (2 * up[-1]) == 0:
        up.append(2 * up[-1])
    return (*up[1:], *reversed(up[:-1]))


def jobs_of(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A job a seed, checked before a rank starts: what `work` reads.  ValueError, or an error of Hydra, for bad input."""
    from omegaconf import OmegaConf

    from megalina.cli.train import check_data
    from megalina.compose import compose

    for name in ("steps", "seeds", "ranks"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    ranks = args.ranks
    if args.float64:
        common = [*replace(LADDER[0], nodes=ranks).all_overrides(), *REAL_MATH, *NO_TIES, "train.dtype=float64"]
        common.append("strategy.packing_memory_gb=0")  # all packings, whatever they cost
    else:
        common = ["experiment=laptop", *SMALL, f"parallel.ep={ranks}", f"train.global_batch_size={4 * ranks}"]
    common += [f"launch.ranks={ranks}", f"train.steps={args.steps}", "guard.spike=none", *args.overrides]
    names = args.strategies.split(",") if args.strategies else (*STRATEGIES, "auto")
    plain = compose(common)
    ep, micro_batch_size = plain.parallel.ep, plain.train.micro_batch_size
    cases = cases_of(names, ep=ep, steps=args.steps, micro_batch_size=micro_batch_size)
    jobs = []
    for seed in range(plain.train.seed, plain.train.seed + args.seeds):
        content = []
        for case in cases:
            config = compose([*common, *case.overrides, f"train.seed={seed}", f"run.dir={folder / 'run'}"])
            check_config(config, ranks)
            content.append(
                {
                    "name": case.name,
                    "config": OmegaConf.to_yaml(OmegaConf.structured(config)),
                    "switches": case.switches,
                    "adapts": case.adapts,
                }
            )
        jobs.append({"seed": seed, "ranks": ranks, "cases": content})
    check_data(plain)
    return jobs


def run(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """All cases of one seed, in one job; what they gave, by name."""
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, __file__, "--folder", str(folder)]
    run_ranks(command, ranks=job["ranks"], logs=folder / "logs")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def work(folder: Path) -> int:
    """One rank: all cases of a job in turn; rank 0 writes their curves."""
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    configs = [load_config(case["config"]) for case in job["cases"]]
    first = configs[0]
    data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
    dist.init_process_group("gloo", timeout=timedelta(seconds=first.cluster.timeout_s))
    found, started_s, status = {}, time.monotonic(), StatusLine()
    for i, (entry, config) in enumerate(zip(job["cases"], configs, strict=True)):
        if dist.get_rank() == 0:
            left_s = (time.monotonic() - started_s) / i * (len(configs) - i) if i else 0.0
            eta = f", {left_s:.0f} s left" if i else ""
            line = f"seed {job['seed']}: {i + 1}/{len(configs)}{eta}  {entry['name']}"
            status.show(line)
        switches = {int(step): packing for step, packing in entry["switches"].items()}
        found[entry["name"]] = curve_of(config, data, switches=switches, adapts=entry["adapts"])
    status.end()
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    return 0


def curve_of(config: PretrainConfig, data: TokenData, *, switches: Mapping[int, int], adapts: bool) -> dict[str, Any]:
    """Trains to the end.  losses: in nats, of each step; weights: a hash of all ranks' final weights, unpacked; skipped: steps
    without an update; packings: of each step.  All ranks call it together."""
    runner = StepRunner(config, data, device=torch.device("cpu"))
    losses, packings, skipped = [], [], 0
    for step in range(1, config.train.steps + 1):
        started_s = time.perf_counter()
        packings.append(runner.mesh.packing)
        result, _ = runner.compute(step)
        losses.append(result.loss)
        skipped += not result.updates
        if adapts:
            runner.adapt(time.perf_counter() - started_s)
        elif step in switches:
            runner.repack(switches[step])
    if 1 in runner.meshes:
        runner.repack(1)  # so that the hashes are of the same shards
    runner.trainable.settle()
    digest = hashlib.sha256()
    for name, parameter in sorted(runner.trainable.gpt.named_parameters()):
        digest.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    digests = all_gather_object(runner.mesh, digest.hexdigest())
    runner.close()
    return {"losses": losses, "weights": digests, "skipped": skipped, "packings": packings}


def rows_of(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By case, over the seeds: how far its curve is from eager's."""
    rows = []
    for name in found[0]:
        pairs = [(of_seed[name], of_seed[EAGER]) for of_seed in found]
        curves = [(case["losses"], eager["losses"]) for case, eager in pairs]
        rows.append(
            {
                "name": name,
                "final_losses": [losses[-1] for losses, _ in curves],
                "largest_nats": max(abs(a - b) for losses, base in curves for a, b in zip(losses, base, strict=True)),
                "largest_relative": max(
                    abs(a - b) / abs(b) for losses, base in curves for a, b in zip(losses, base, strict=True)
                ),
                "together": min(map(_steps_together, curves)),
                "late_nats": statistics.fmean(
                    a - b for losses, base in curves for a, b in list(zip(losses, base, strict=True))[len(base) // 2 :]
                ),
                "bit_equal": sum(a["losses"] == b["losses"] and a["weights"] == b["weights"] for a, b in pairs),
                "seeds": len(pairs),
            }
        )
    return rows


def _steps_together(curves: tuple[Sequence[float], Sequence[float]]) -> int:
    """How many steps there are before two curves part."""
    parted = [abs(a - b) > APART_NATS for a, b in zip(*curves, strict=True)]
    return parted.index(True) if True in parted else len(parted)


def problems(found: Sequence[Mapping[str, Any]], *, limit: float) -> list[str]:
    """Lines about losses that are not finite, steps that were skipped, and relative differences above the limit."""
    lines = []
    for of_seed in found:
        for name, case in of_seed.items():
            losses, base = case["losses"], of_seed[EAGER]["losses"]
            if not all(map(math.isfinite, losses)):
                lines.append(f"{name}: the loss is not finite")
            elif case["skipped"]:
                lines.append(f"{name}: {case['skipped']} of {len(losses)} steps were skipped")
            else:
                worst = max(abs(a - b) / abs(b) for a, b in zip(losses, base, strict=True))
                if not worst <= limit:
                    lines.append(f"{name}: a loss differs from eager's by {worst:.1e} of it, at most {limit:.0e} is allowed")
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in the order of the rows, and below it how far the seeds are apart."""
    eager = next(row for row in rows if row["name"] == EAGER)
    seeds = range(1, eager["seeds"] + 1)
    lines = [
        f"| strategy | last loss, seed {', '.join(map(str, seeds))} | steps within {APART_NATS:g} nats of eager, all seeds "
        "| largest difference, nats | mean difference, second half | bit-equal |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        finals = ", ".join(f"{loss:.4f}" for loss in row["final_losses"])
        if row["name"] == EAGER:
            lines.append(f"| {EAGER} | {finals} | | | | |")
            continue
        differences = f"{row['together']} | {row['largest_nats']:.1e} | {row['late_nats']:+.1e}"
        lines.append(f"| {row['name']} | {finals} | {differences} | {_bits(row)} |")
    if len(eager["final_losses"]) > 1:
        apart = max(eager["final_losses"]) - min(eager["final_losses"])
        lines += ["", f"Between seeds, eager's last losses are {apart:.1e} nats apart."]
    return "\n".join(lines)


def float64_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: relative differences."""
    lines = ["| strategy | last loss | largest relative difference to eager | bit-equal |", "|---|---|---|---|"]
    for row in rows:
        final = f"{row['final_losses'][0]:.12f}"
        if row["name"] == EAGER:
            lines.append(f"| {EAGER} | {final} | | |")
        else:
            lines.append(f"| {row['name']} | {final} | {row['largest_relative']:.1e} | {_bits(row)} |")
    return "\n".join(lines)


def _bits(row: Mapping[str, Any]) -> str:
    """Losses and final weights."""
    equal, seeds = row["bit_equal"], row["seeds"]
    return "yes" if equal == seeds else f"{equal} of {seeds} seeds" if equal else "no"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py, such as model.d_model=256")
    parser.add_argument("--float64", action="store_true", help="the ladder's model in float64, against a limit")
    for name, what in (("steps", "of each strategy"), ("seeds", "how many"), ("ranks", "expert-parallel gloo ranks")):
        usual = f"default: {DEFAULTS[name]}; --float64: {FLOAT64_DEFAULTS[name]}"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} ({usual})")
    parser.add_argument("--strategies", default="", metavar="A,B", help="default: all; eager always runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all curves")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # pretrain_gpt_moe.py, tools/
    from megalina.console import command

    command(main)
