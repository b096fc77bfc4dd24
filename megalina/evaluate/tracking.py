"""Tracking: an evaluation as a W&B run of one step, with all numbers, tables, plots and the page.

Names: `MODE/p50_ms`, `MODE/layer_03/load_max_over_mean`, tables `modes`, `layers`, `popularity`, `latencies`, plots `latency`,
`device_load`, `popularity_map`, `layer_time`, `foresight`, and `report`, the page.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb

from megalina.config import WandbConfig
from megalina.evaluate.measures import STATIC
from megalina.evaluate.report_figures import figures
from megalina.track.tracker import Background, Picture
from megalina.track.wandb_run import WandbRun

FINISH_TIMEOUT_S = 120.0  # wandb gives up after 90 s without a network
PAIRS = {"quartiles": ("p25", "p75"), "interval": ("low", "high")}
Row = Sequence[str | float | None]


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
