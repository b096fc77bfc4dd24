"""What pipelines on an emulated cluster came to: a table in Markdown, and a picture of where a step's time goes."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pipelining.cases import SCHEDULES
from megalina.compare.report import SHARES
from megalina.compare.results import EAGER, VALID_OVERRUN

FORECASTS = {"forecast_s": "forecasts", "with_hosts_s": "forecasts with hosts"}
ACROSS, INSIDE = "experts across nodes", "stages across nodes"


def title_of(name: str) -> str:
    """`1f1b`: stages across nodes; other names: experts."""
    return f"{INSIDE}, {name}" if name in SCHEDULES else f"{ACROSS}, {name}"


def competitors(setting: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Those to be shown: of eager the fastest variant."""
    return {name: m for name, m in setting["strategies"].items() if name == EAGER or not name.startswith(EAGER)}


def table(setting: Mapping[str, Any]) -> str:
    """Ratios are to the fastest of those with experts across nodes."""
    shown = competitors(setting)
    best = min((m for name, m in shown.items() if name not in SCHEDULES), key=lambda m: m["median_step_s"])
    late = setting["overrun_fraction"]
    lines = [
        f"**{setting['name']}** ({setting['slow_motion']:g} times in slow motion, in its own time); overrun {late:.1%}"
        + ("" if setting["valid"] else f", more than {VALID_OVERRUN:.0%}: not valid"),
        "",
        "| | step ms | faster than the best with experts across nodes | quartiles | devices idle ms "
        "| waits ms: stages, tokens, gradients, sizes | busiest link ms | cells and messages alone ms | forecast ms "
        "| with hosts ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in shown.items():
        low, high = (spread / best["ratio_to_eager"] for spread in m["ratio_spread"])
        waits = ", ".join(f"{m[f'{of}_exposed_s'] * 1e3:.0f}" for of in ("messages", "a2a", "grads", "other"))
        alone = _beside(setting["walk_s"].get(name), m["median_step_s"])
        forecast, with_hosts = (_beside(setting[of].get(name), m["median_step_s"]) for of in FORECASTS)
        ratio = best["median_step_s"] / m["median_step_s"]
        lines.append(
            f"| {title_of(name)} | {m['median_step_s'] * 1e3:.0f} | {ratio:.2f} | {low:.2f} - {high:.2f} "
            f"| {m['idle_s'] * 1e3:.0f} | {waits} | {m['link_s'] * 1e3:.0f} | {alone} | {forecast} | {with_hosts} |"
        )
    worst = max(m["largest_loss_difference"] for m in shown.values())
    last = [f"Losses differ by at most {worst:.1e} of them."]
    for of, label in FORECASTS.items():
        errors = [abs(s / shown[name]["median_step_s"] - 1) for name, s in setting[of].items() if name in shown]
        if errors:
            last.append(f"Median error of {len(errors)} {label}: {statistics.median(errors):.1%}.")
    return "\n".join([*lines, "", "  ".join(last)])


def _beside(expected_s: float | None, measured_s: float) -> str:
    """What was expected, and how far from what was measured."""
    return "" if expected_s is None else f"{expected_s * 1e3:.0f} ({expected_s / measured_s - 1:+.1%})"


def draw(path: Path, settings: Sequence[Mapping[str, Any]], *, note: str) -> None:
    """PNG or SVG: of each competitor the step of its busiest and most waiting ranks, by what the time went to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.8 + 3.4 * len(settings)), layout="constrained")
    axes = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
    for axis, setting in zip(axes, settings, strict=True):
        shown = competitors(setting)
        names = list(shown)[::-1]
        left = [0.0] * len(names)
        for field, label, colour in SHARES:
            steps = [shown[name]["median_step_s"] * 1e3 for name in names]
            if field:
                widths = [min(shown[n][field] * 1e3, step - done) for n, step, done in zip(names, steps, left, strict=True)]
            else:
                widths = [step - done for step, done in zip(steps, left, strict=True)]
            axis.barh([title_of(name) for name in names], widths, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_title(setting["name"], loc="left", weight="bold")
        axis.set_xlabel("milliseconds per step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"Layers or experts across slow nodes ({note})", fontsize=11)
    figure.savefig(path, dpi=100)
