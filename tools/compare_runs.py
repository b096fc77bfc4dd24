"""Compare runs: print a table of every run at or below a folder, sorted by validation loss, and draw their loss curves.

python tools/compare_runs.py FOLDER [--json FILE] [--png FILE]
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalina.track.metrics import Record, read_metrics, read_yaml
from megalina.track.svg_chart import smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_A_DIFFERENCE = ("run.", "tracker.", "data.cache_dir")  # where it lies and how it is watched
NOT_RUNS = ("wandb", "tensorboard", "checkpoints")
MAX_CURVES = 20


@dataclass(frozen=True, slots=True)
class RunResult:
    name: str  # folder, relative to the one that was searched
    settings: Mapping[str, Any]  # "optim.lr" -> 0.001
    records: Sequence[Record]
    problem: str = ""  # why the records are missing; empty: nothing is wrong

    @property
    def steps(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def total_steps(self) -> int:
        return int(self.settings.get("train.steps", 0))

    @property
    def finished(self) -> bool:
        return bool(self.records) and self.steps >= self.total_steps

    @property
    def val_loss(self) -> float | None:
        """The newest."""
        return next((record["val_loss"] for record in reversed(self.records) if record.get("val_loss") is not None), None)

    @property
    def train_loss(self) -> float | None:
        """Mean over the last tenth of the steps, at most 50: a single step's loss is noise."""
        losses = [record["loss"] for record in self.records if record.get("loss") is not None]
        tail = losses[-max(1, min(50, len(losses) // 10)) :]
        return sum(tail) / len(tail) if tail else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the steps."""
        known = sorted(record["tokens_per_s"] for record in self.records if record.get("tokens_per_s") is not None)
        return known[len(known) // 2] if known else None

    @property
    def looks_ahead(self) -> bool:
        """Expert choice sees later tokens: the validation loss is not comparable with other routers'."""
        return self.settings.get("router.kind") == "expert_choice"


def find_runs(folder: Path) -> list[RunResult]:
    """Every run folder (one with a run's config.yaml) at or below `folder`, in the order of their names.

    A run whose metrics can't be read is listed with its problem.  ValueError if there is no run.
    """
    runs = []
    for found, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in NOT_RUNS)
        if "config.yaml" in files and (run := _read(Path(found), folder)) is not None:
            runs.append(run)
    if not runs:
        raise ValueError(f"{folder}: no run folder at or below it (a run folder holds config.yaml and metrics.jsonl)")
    return runs


def _read(run_dir: Path, folder: Path) -> RunResult | None:
    """None: the config.yaml is not a run's."""
    config = read_yaml(run_dir / "config.yaml")
    if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
        return None
    name = run_dir.name if run_dir == folder else str(run_dir.relative_to(folder))
    settings = dict(_flat(config))
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return RunResult(name, settings, [], "never began: no metrics.jsonl")
    try:
        return RunResult(name, settings, read_metrics(metrics))
    except ValueError as error:
        return RunResult(name, settings, [], str(error))


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for key, value in config.items():
        entries += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return entries


def by_val_loss(runs: Sequence[RunResult]) -> list[RunResult]:
    """Lowest validation loss first; runs without one last."""
    return sorted(runs, key=lambda run: (run.val_loss is None, run.val_loss or 0.0, run.name))


def differing(runs: Sequence[RunResult]) -> list[str]:
    """Names of the settings in which not all runs agree, without those that only say where a run lies or how it is watched."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    missing = object()
    return [
        name
        for name in names
        if not name.startswith(NOT_A_DIFFERENCE)
        and any(run.settings.get(name, missing) != runs[0].settings.get(name, missing) for run in runs[1:])
    ]


def rows(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """A JSON object a run, sorted by validation loss."""
    names = differing(runs)
    return [
        {
            "run": run.name,
            "val_loss": run.val_loss,
            "train_loss": run.train_loss,
            "tokens_per_s": run.tokens_per_s,
            "steps": run.steps,
            "total_steps": run.total_steps,
            "finished": run.finished,
            "looks_at_later_tokens": run.looks_ahead,
            "problem": run.problem,
            "overrides": {name: run.settings.get(name) for name in names},
        }
        for run in by_val_loss(runs)
    ]


def _cell(value: Any, form: str = "") -> str:
    if value is None:
        return "-"
    return format(value, form) if form else str(value)


def table(runs: Sequence[RunResult]) -> str:
    """Plain text, a line a run, sorted by validation loss."""
    names = differing(runs)
    columns = ["run", "val loss", "train loss", "tokens/s", "steps"]
    # "optim.lr" is "lr" where no other column would be called that
    ends = [name.rsplit(".", 1)[-1] for name in names]
    heads = [end if ends.count(end) == 1 and end not in columns else name for name, end in zip(names, ends, strict=True)]
    lines = [[*columns, *heads]]
    for run in by_val_loss(runs):
        steps = str(run.steps) if run.finished else f"{run.steps}/{run.total_steps} unfinished"
        val_loss = _cell(run.val_loss, ".4f") + ("*" if run.looks_ahead else "")
        numbers = [val_loss, _cell(run.train_loss, ".4f"), _cell(run.tokens_per_s, ",.0f"), steps]
        lines.append([run.name, *numbers, *(_cell(run.settings.get(name)) for name in names)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    shown.insert(1, "  ".join("-" * width for width in widths))
    if any(run.looks_ahead for run in runs):
        shown.append("* expert choice looks at later tokens of the group: not comparable with other routers")
    shown += [f"{run.name}: {run.problem}" for run in runs if run.problem]
    return "\n".join(shown)


def curves(runs: Sequence[RunResult]) -> "Figure":
    """Loss over steps, the best `MAX_CURVES` runs: training pale and smoothed, validation with dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = differing(runs)
    with_steps = [run for run in by_val_loss(runs) if run.records]
    for number, run in enumerate(with_steps[:MAX_CURVES]):
        colour = f"C{number % 10}"
        style = "-" if number < 10 else "--"
        told = ", ".join(f"{name.rsplit('.', 1)[-1]} {run.settings.get(name)}" for name in names) or run.name
        marked = told if run.finished else f"{told} (unfinished)"
        steps = [record["step"] for record in run.records]
        losses = smoothed([record.get("loss") for record in run.records], len(steps) // 40)
        axes.plot(steps, [math.nan if y is None else y for y in losses], color=colour, ls=style, alpha=0.45, lw=1.2)
        evaluations = [(record["step"], record["val_loss"]) for record in run.records if record.get("val_loss") is not None]
        xs, ys = [x for x, _ in evaluations], [y for _, y in evaluations]
        axes.plot(xs, ys, color=colour, ls=style, marker="o", ms=4, lw=1.6, label=marked)
    left_out = len(with_steps) - MAX_CURVES
    axes.set_title(
        "validation (dots) and training loss" + (f"; {left_out} worse runs left out" if left_out > 0 else ""), fontsize=11
    )
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if with_steps:
        axes.legend(fontsize=8, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Table and loss curves of all runs at or below FOLDER, best validation loss first."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a sweep's folder, or any folder of run folders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON, an object a run")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="where to draw the loss curves (default: FOLDER/compare_runs.png)"
    )
    args = parser.parse_args(argv)
    try:
        runs = find_runs(args.folder)
        print(table(runs))
        if args.json:
            args.json.write_text(json.dumps(rows(runs), indent=1) + "\n", encoding="utf-8")
        picture = args.png or args.folder / "compare_runs.png"
        curves(runs).savefig(picture)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"loss curves: {picture}")
    return 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
