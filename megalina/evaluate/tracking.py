"""Tracking: an evaluation as a W&B run of one step, with all numbers, tables, plots and the page.

Names: `MODE/p50_ms`, `MODE/layer_03/load_max_over_mean`, tables `modes`, `layers`, `popularity`, `latencies`, plots `latency`,
`device_load`, `popularity_map`, `layer_time`, `foresight`, and `report`, the page.  The page has the plots as SVG; trackers show
images, so here they are matplotlib figures.
"""

import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megalina.config import WandbConfig
from megalina.evaluate.findings import chosen_mode
from megalina.evaluate.measures import IDEAL, STATIC
from megalina.evaluate.report_charts import PARTS, instruction_means
from megalina.track.expert_load import LIGHT, colour_levels
from megalina.track.tracker import Background, Picture
from megalina.track.wandb_run import WandbRun

FINISH_TIMEOUT_S = 120.0  # wandb gives up after 90 s without a network
PAIRS = {"quartiles": ("p25", "p75"), "interval": ("low", "high")}
Row = Sequence[str | float | None]
COLOURS = {STATIC: "#2468b4", "best": "#d9601a", IDEAL: "#20784a"}
OTHERS = ("#a04cc0", "#1a94b0", "#c99a12", "#c83f74", "#747b85")
PART_COLOURS = ("#2468b4", "#d9601a", "#a04cc0", "#cf9fe0", "#c99a12", "#747b85")


class EvaluationRun(WandbRun):
    """A W&B run that takes tables and a page, too."""

    def tables(self, step: int, tables: Mapping[str, tuple[Sequence[str], Sequence[Row]]]) -> None:
        """Each of names of columns and rows."""
        made = {
            name: wandb.Table(columns=list(columns), data=[list(row) for row in rows]) for name, (columns, rows) in tables.items()
        }
        self._run.log({"step": step} | made)

    def page(self, step: int, html: str) -> None:
        self._run.log({"step": step, "report": wandb.Html(html, inject=False)})


def track(found: Mapping[str, Any], html: str, out: Path, config: WandbConfig, *, timeout_s: float = FINISH_TIMEOUT_S) -> None:
    """Never raises and never takes longer than `timeout_s`: what W&B does wrong is a line of warning.  Each evaluation is a
    run of its own, in OUT/wandb."""
    (out / "wandb_id").unlink(missing_ok=True)
    step, drawing = found["settings"]["step"], threading.Lock()
    shown = {**found["settings"], "note": found["note"], "definitions": found["definitions"]}
    pictures = {name: Picture(draw, drawing) for name, draw in figures(found).items()}

    def job(run: Any) -> None:
        run.log(step, scalars_of(found))
        run.tables(step, tables_of(found))
        drawn: dict[str, np.ndarray] = {name: picture.pixels() for name, picture in pictures.items()}
        run.images(step, drawn)
        run.page(step, html)
        run.finish(failed=False)

    Background("W&B", lambda: EvaluationRun(config, run_dir=out, run_config=shown)).finish(job, timeout_s=timeout_s)


def scalars_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Flat, as W&B wants them; what a mode has not is left out."""
    out = {"quality_difference": float(found["quality_difference"])}
    for name, mode in found["modes"].items():
        for key, value in mode.items():
            if isinstance(value, int | float):
                out[f"{name}/{key}"] = float(value)
            elif (ends := PAIRS.get(key.rpartition("_")[2])) and value is not None:
                out |= {f"{name}/{key}_{end}": float(side) for end, side in zip(ends, value, strict=True)}
        for layer in mode["layers"]:
            numbers = {key: value for key, value in layer.items() if isinstance(value, int | float) and key != "layer"}
            out |= {f"{name}/layer_{layer['layer']:02d}/{key}": float(value) for key, value in numbers.items()}
        for kind, scores in (mode["tasks"] or {}).items():
            if isinstance(scores, Mapping):
                found_scores = {key: score["value"] for key, score in scores.items() if isinstance(score, Mapping)}
                out |= {f"{name}/{kind}/{key}": float(value) for key, value in found_scores.items()}
    return out


def tables_of(found: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str | float | None]]]]:
    """{name: (columns, rows)}; None: a mode has no such number."""
    modes = found["modes"]
    keys = [key for key in modes[STATIC] if any(isinstance(mode[key], int | float) for mode in modes.values())]
    layer_keys = [
        key for key, value in modes[STATIC]["layers"][0].items() if not isinstance(value, list | dict) and key != "layer"
    ]
    return {
        "modes": (["mode", *keys], [[name, *(mode[key] for key in keys)] for name, mode in modes.items()]),
        "layers": (
            ["mode", "layer", *layer_keys],
            [[name, layer["layer"], *(layer[k] for k in layer_keys)] for name, mode in modes.items() for layer in mode["layers"]],
        ),
        "popularity": (
            ["layer", "expert", "share"],
            [[layer["layer"], e, share] for layer in modes[STATIC]["layers"] for e, share in enumerate(layer["popularity"])],
        ),
        "latencies": (
            ["mode", "batch", "latency_ms"],
            [[name, batch, ms] for name, mode in modes.items() for batch, ms in enumerate(mode["latency_ms"])],
        ),
    }


def figures(found: Mapping[str, Any]) -> dict[str, Callable[[], Figure]]:
    """What draws each, by its name; `emulated ...` stands below every one where something was emulated."""
    modes = found["modes"]
    drawers: dict[str, Callable[[Axes], None]] = {
        "latency": lambda axes: _latency(axes, modes),
        "device_load": lambda axes: _loads(axes, modes),
        "popularity_map": lambda axes: _popularity(axes, modes[STATIC]["layers"]),
        "layer_time": lambda axes: _layer_time(axes, modes),
    }
    if any(layer["accuracy_recall"] is not None for mode in modes.values() for layer in mode["layers"]):
        drawers["foresight"] = lambda axes: _foresight(axes, modes)
    note = found["note"] if found["note"].startswith("emulated") else ""

    def drawer(draw: Callable[[Axes], None]) -> Callable[[], Figure]:
        def figure() -> Figure:
            made = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
            draw(made.subplots())
            if note:
                made.supxlabel("\n".join(textwrap.wrap(note, 150)), fontsize=7)
            return made

        return figure

    return {name: drawer(draw) for name, draw in drawers.items()}


def _colours(modes: Mapping[str, Any]) -> dict[str, str]:
    others = [name for name in modes if name not in COLOURS]
    return {name: COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in modes}


def _legend(axes: Axes) -> None:
    """Beside the plot, so that it hides nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _latency(axes: Axes, modes: Mapping[str, Any]) -> None:
    for name, colour in _colours(modes).items():
        own = sorted(modes[name]["latency_ms"])
        share = np.arange(1, len(own) + 1) / len(own)
        axes.step(own, share, where="post", color=colour, label=name, linestyle="--" if name == IDEAL else "-")
    axes.set(xlabel="latency of a batch, milliseconds", ylabel="share of batches", ylim=(0, 1.03))
    _legend(axes)


def _loads(axes: Axes, modes: Mapping[str, Any]) -> None:
    colours = _colours(modes)
    for name in dict.fromkeys([STATIC, chosen_mode(modes)]):
        layers = modes[name]["layers"]
        at = [str(layer["layer"]) for layer in layers]
        axes.plot(at, [layer["device_load"][0] for layer in layers], "o-", color=colours[name], label=f"{name}, busiest device")
        axes.plot(at, [layer["device_load"][-1] for layer in layers], "o:", color=colours[name], label=f"{name}, idlest device")
    axes.axhline(1.0, color="#747b85", linestyle="--", linewidth=1)
    axes.set(xlabel="MoE layer", ylabel="rows of a device / mean")
    _legend(axes)


def _popularity(axes: Axes, layers: Any) -> None:
    share_LE = np.array([layer["popularity"] for layer in layers])
    axes.imshow(LIGHT.table()[colour_levels(share_LE * share_LE.shape[1])], aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
    axes.set(xlabel="expert", ylabel="MoE layer", title="rows of experts: blue a quarter, orange four times an equal share")


def _layer_time(axes: Axes, modes: Mapping[str, Any]) -> None:
    means = {name: instruction_means(mode["layers"]) for name, mode in modes.items()}
    begin = np.zeros(len(modes))
    for (part, instructions), colour in zip(PARTS.items(), PART_COLOURS, strict=True):
        own = np.array([sum(of_mode.get(instruction, 0.0) for instruction in instructions) for of_mode in means.values()])
        axes.barh(list(modes), own, left=begin, color=colour, label=part)
        begin += own
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds in a MoE layer")
    _legend(axes)


def _foresight(axes: Axes, modes: Mapping[str, Any]) -> None:
    for name, colour in _colours(modes).items():
        known = [layer for layer in modes[name]["layers"] if layer["accuracy_recall"] is not None]
        if known:
            axes.plot(
                [layer["layer"] for layer in known], [layer["accuracy_recall"] for layer in known], "o-", color=colour, label=name
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="MoE layer", ylabel="foreseen among the 2 x top-k most popular", ylim=(0, 1.05))
    _legend(axes)
