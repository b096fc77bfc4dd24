"""The report of a validation: a table in Markdown and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.validation.cases import Row
from benchmarks.validation.fit import Simulated

CLASSES = {"a2a": "tokens", "grads": "gradients"}


def table(rows: Sequence[Row], found: Mapping[str, Simulated], result: Mapping[str, Any]) -> str:
    lines = [
        "| configuration | | measured ms | simulated ms | error | waits: tokens ms | simulated | gradients ms | simulated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        own, m = found[r.name], r.measured
        error = own.step_s / m["median_step_s"] - 1
        waits = " | ".join(f"{m[f'{name}_exposed_s'] * 1e3:.0f} | {own.exposed_s[name] * 1e3:.0f}" for name in CLASSES)
        side = "held out" if r.held_out else "fitted"
        lines.append(f"| {r.name} | {side} | {m['median_step_s'] * 1e3:.0f} | {own.step_s * 1e3:.0f} | {error:+.1%} | {waits} |")
    host = ", ".join(f"{name} {value:.3g}" for name, value in result["host"].items())
    return "\n".join([*lines, "", f"Fitted: {host}.", *(_line(side, result[side]) for side in ("fitted", "heldout"))])


def _line(side: str, e: Mapping[str, Any]) -> str:
    order = "" if e["pair_order"] is None else f", {e['pair_order']:.1%} of {e['pairs']} pairs in order"
    waits = e["exposed_error"]
    return (
        f"{side}: {e['configurations']} configurations; step time off by {_share(e['median_error'])} (median), "
        f"{_share(e['p90_error'])} (90th percentile){order}; ratios off by {_share(e['ratio_error'])} (median), "
        f"{_share(e['ratio_p90_error'])} (90th percentile); waits off by {_share(waits['a2a'])} (tokens), "
        f"{_share(waits['grads'])} (gradients)"
    )


def _share(error: float | None) -> str:
    return "-" if error is None else f"{error:.1%}"


def draw(path: Path, rows: Sequence[Row], found: Mapping[str, Simulated], result: Mapping[str, Any]) -> None:
    """PNG or SVG: simulated over measured step times, fitted and held out; and the waits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), dpi=110, layout="constrained")
    steps, waits = figure.subplots(1, 2)
    sides = ((False, "fitted on", "#a0aec0", "o"), (True, "held out", "#2b6cb0", "o"))
    for held_out, label, colour, marker in sides:
        own = [r for r in rows if r.held_out == held_out]
        x = [r.measured["median_step_s"] * 1e3 for r in own]
        steps.scatter(x, [found[r.name].step_s * 1e3 for r in own], color=colour, marker=marker, s=26, label=label)
    for (name, label), colour in zip(CLASSES.items(), ("#e02020", "#dd8a1f"), strict=True):
        own = [r for r in rows if r.held_out]
        x = [r.measured[f"{name}_exposed_s"] * 1e3 for r in own]
        waits.scatter(x, [found[r.name].exposed_s[name] * 1e3 for r in own], color=colour, s=26, label=f"waits for {label}")
    for axis, title in ((steps, "Step time"), (waits, "What the device waits for, held out")):
        high = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([0, high], [0, high], color="black", linewidth=1)
        axis.fill_between([0, high], [0, high * 0.9], [0, high * 1.1], color="black", alpha=0.07, label="within 10%")
        axis.set_xlim(0, high)
        axis.set_ylim(0, high)
        axis.set_aspect("equal")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("measured on the emulated cluster, ms")
        axis.set_ylabel("simulated, ms")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left")
    e = result["heldout"]
    figure.suptitle(
        f"{e['configurations']} held-out configurations: step time off by {e['median_error']:.1%} in the median, "
        f"{e['p90_error']:.1%} at the 90th percentile",
        fontsize=11,
    )
    figure.savefig(path)
